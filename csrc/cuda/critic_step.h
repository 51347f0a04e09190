// Loss and gradient of an ensemble of critics for fixed targets: sum over members of
// mean_b (Q_m(s_b, a_b) - y_b)^2. Three launches: forward, loss and deltas of a tile of rows;
// weight gradients; sums.
//
// obs (rows, O), action (rows, A), target (rows); gradients (flat buffer) is added to; loss and
// q_mean (members), q (members, rows) or null: device memory of the caller. Workspace: the tape,
// about 16 bytes per row, member and hidden unit.
//
// Operations about 6 rows (weights of a member) per member: 256 rows, 23 -> 3 x 256 -> 1, two
// members 0.42 GFLOP, floor 6.3 us at 67 TFLOP/s; the tape is 6.3 MB written and read: 3.8 us at
// 3.35 TB/s if it left L2. Eight to sixteen tiles occupy few multiprocessors, so latency decides.
#pragma once

#include "cpu/training.h"
#include "cuda/weight_gradients.h"
#include "partition.h"

namespace flame::FLAME_ISA {

template <int kRowsPerWarp>
struct CriticStepKernel {
    static constexpr const char* kName = "critic_step";
    MlpView net;
    CriticStepArgs a;
    Tape tape;
    float* q;  // (members, rows)
    TileLds lds;

    FLAME_BODY void operator()(const Block& block) const {
        auto tile = make_tile<kRowsPerWarp>(block, lds);
        const int member = static_cast<int>(block.index / tape.tiles);
        const int64_t index = block.index % tape.tiles;
        const int64_t first = index * tile.kRows;
        const int rows = row_count(first, a.rows, tile.kRows);
        const TileTape kept{&tape, member, first, index};
        load_rows(block, tile, rows, net.layers[0].in, [&](int r, int c) {
            const int64_t b = first + r;
            const float x = c < a.action_dim ? a.action[b * a.action_ld + c]
                                             : a.obs[b * a.obs_ld + c - a.action_dim];
            if (member == 0) tape.input[b * tape.input_ld + c] = x;
            return x;
        });
        forward_tile(block, tile, net, member, rows, 0, kept);
        block.each_thread([&](int t) {
            if (t < rows) output_delta(tile.x + t * tile.ld, first + t, kept, t);
        });
        backward_tile<true>(block, tile, net, rows, kept);
    }

    // x holds Q and receives the delta, zero to the padded end.
    FLAME_BODY void output_delta(float* x, int64_t b, const TileTape& kept, int i) const {
        const float value = x[0];
        const float delta = 2.0f / static_cast<float>(a.rows) * (value - a.target[b]);
        q[kept.member * a.rows + b] = value;
        *kept.output_delta(i, 1) = delta;
        for (int c = 0; c < kPadding; ++c) x[c] = c == 0 ? delta : 0.0f;
    }
};

// One block per member.
struct CriticSumsKernel {
    static constexpr const char* kName = "critic_sums";
    CriticStepArgs a;
    const float* q;

    FLAME_BODY void operator()(const Block& block) const {
        const float* values = q + block.index * a.rows;
        const double count = static_cast<double>(a.rows);
        block.each_warp([&](const Warp& warp) {
            if (warp.index != 0) return;
            const int n = static_cast<int>(a.rows);
            const double loss = warp.sum<double>(n, [&](int i) {
                const double error =
                    static_cast<double>(values[i]) - static_cast<double>(a.target[i]);
                return error * error;
            });
            const double mean =
                warp.sum<double>(n, [&](int i) { return static_cast<double>(values[i]); });
            warp.each(1, [&](int) {
                a.loss[block.index] = loss / count;
                a.q_mean[block.index] = mean / count;
            });
        });
    }
};

struct CriticMemory {
    TilePlan plan;
    Tape tape;
    float* q;
};

static inline CriticMemory carve_critic_step(const Launcher& launch, const CriticStepArgs& a,
                                             Carver& memory) {
    CriticMemory m{};
    m.plan = plan_tiles(launch, a.spec, {a.rows, 1, a.spec.members});
    m.tape = carve_tape(a.spec, a.rows, m.plan.tiles, true, memory);
    m.q = a.q != nullptr ? a.q : memory.floats(static_cast<size_t>(a.spec.members) * a.rows);
    return m;
}

static inline void critic_step(const Launcher& launch, const CriticStepArgs& a, Carver& memory) {
    const CriticMemory m = carve_critic_step(launch, a, memory);
    with_rows(m.plan, [&](auto rows) {
        const CriticStepKernel<decltype(rows)::value> kernel{make_view(a.spec, a.parameters), a,
                                                             m.tape, m.q, m.plan.lds};
        launch(kernel, m.plan.tiles * a.spec.members, m.plan.shared);
    });
    weight_gradients(launch, a.spec, m.tape, a.gradients);
    launch(CriticSumsKernel{a, m.q}, a.spec.members, 0);
}

}  // namespace flame::FLAME_ISA
