// Qmin(s, a) over an ensemble and its gradient with respect to the action. A block carries its rows
// through every member and sends a one back through the smallest (the first of equals).
//
// obs (rows, O), action (rows, A), q_min (rows), gradient (rows, A) dense: device memory of the
// caller. Workspace: activations' slopes, about 12 bytes per row, member and hidden unit.
//
// Operations about 4 rows (weights of a member) per member: 256 rows, 23 -> 3 x 256 -> 1, two
// members 0.28 GFLOP, floor 4.2 us at 67 TFLOP/s.
#pragma once

#include "cpu/training.h"
#include "cuda/tape.h"
#include "partition.h"
#include "scalar_rules.h"

namespace flame::FLAME_ISA {

template <int kRowsPerWarp>
struct QGradientKernel {
    static constexpr const char* kName = "q_gradient";
    MlpView net;
    QGradientArgs a;
    Tape tape;
    TileLds lds;

    FLAME_BODY void operator()(const Block& block) const {
        auto tile = make_tile<kRowsPerWarp>(block, lds);
        const int64_t first = block.index * tile.kRows;
        const int rows = row_count(first, a.rows, tile.kRows);
        float* q = tile.extra;  // (members, kRows)
        for (int m = 0; m < net.members; ++m) {
            tile = make_tile<kRowsPerWarp>(block, lds);
            load_rows(block, tile, rows, net.layers[0].in, [&](int r, int c) {
                const int64_t b = first + r;
                return c < a.action_dim ? a.action[b * a.action_ld + c]
                                        : a.obs[b * a.obs_ld + c - a.action_dim];
            });
            forward_tile(block, tile, net, m, rows, 0, TileTape{&tape, m, first, block.index});
            block.each_thread([&](int t) {
                if (t < rows) q[m * tile.kRows + t] = tile.x[t * tile.ld];
            });
        }
        for (int m = 0; m < net.members; ++m) {
            block.each_thread([&](int t) {
                if (t >= rows) return;
                const int best = smallest(q + t, tile.kRows);
                if (m == 0) a.q_min[first + t] = q[best * tile.kRows + t];
                float* delta = tile.x + t * tile.ld;
                for (int c = 0; c < kPadding; ++c) delta[c] = c == 0 && m == best ? 1.0f : 0.0f;
            });
            backward_tile<false>(block, tile, net, rows, TileTape{&tape, m, first, block.index});
            add_input_gradient(block, tile, m, first, rows);
        }
    }

    FLAME_BODY int smallest(const float* q, int stride) const {
        int best = 0;
        for (int m = 1; m < net.members; ++m) {
            if (takes_minimum(q[m * stride], q[best * stride])) best = m;
        }
        return best;
    }

    FLAME_BODY void add_input_gradient(const Block& block, Tile<kRowsPerWarp>& tile, int member,
                                       int64_t first, int rows) const {
        const LayerView layer = member_layer(net, 0, member);
        const Operand<false> weight{layer.weight, layer.in, layer.out, a.action_dim};
        float* to = a.gradient + first * a.action_dim;
        multiply<kRowsPerWarp>(block, rows, tile.x, tile.ld, weight, tile.slab,
                               [&](int r, int c, float sum) {
                                   float* at = to + r * a.action_dim + c;
                                   *at = member == 0 ? sum : *at + sum;
                               });
    }
};

struct QGradientMemory {
    TilePlan plan;
    Tape tape;
};

static inline QGradientMemory carve_q_gradient(const Launcher& launch, const QGradientArgs& a,
                                               Carver& memory) {
    QGradientMemory m{};
    m.plan = plan_tiles(launch, a.spec, {a.rows, 1, 1, a.spec.members});
    m.tape = carve_tape(a.spec, a.rows, m.plan.tiles, false, memory);
    return m;
}

static inline void q_gradient(const Launcher& launch, const QGradientArgs& a, Carver& memory) {
    if (a.rows == 0) return;
    const QGradientMemory m = carve_q_gradient(launch, a, memory);
    with_rows(m.plan, [&](auto rows) {
        const QGradientKernel<decltype(rows)::value> kernel{make_view(a.spec, a.parameters), a,
                                                            m.tape, m.plan.lds};
        launch(kernel, m.plan.tiles, m.plan.shared);
    });
}

}  // namespace flame::FLAME_ISA
