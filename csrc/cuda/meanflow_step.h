// The MeanFlow loss and its gradient (Geng et al. 2025, Eqs. 9-11): value, one tangent and backward
// pass of a tile of rows in one launch, then weight gradients, then the loss's sum.
//
// obs (rows, O) with row distance obs_ld; z, velocity (rows, A) dense; r, t
// (rows); gradients (flat buffer) is added to; loss one value: device memory of the caller. The
// tangent is under a stop-gradient: it shares the value's activation derivatives and is not kept.
// Workspace: the tape, about 16 bytes per row and hidden unit.
//
// Operations about 8 rows (weights): 256 rows, 55 -> 3 x 256 -> 6, 0.30 GFLOP, floor 4.4 us at 67
// TFLOP/s. A tile of 32 rows holds 16 samples: 16 blocks, so latency decides.
#pragma once

#include "cpu/training.h"
#include "cuda/weight_gradients.h"
#include "partition.h"

namespace flame::FLAME_ISA {

constexpr int kMeanFlowGroup = 2;  // a value and its tangent

template <int kRowsPerWarp>
struct MeanFlowStepKernel {
    static constexpr const char* kName = "meanflow_step";
    MlpView net;
    MeanFlowStepArgs a;
    Tape tape;
    double* errors;  // (rows)
    TileLds lds;

    FLAME_BODY void operator()(const Block& block) const {
        auto tile = make_tile<kRowsPerWarp>(block, lds);
        constexpr int kSamples = Tile<kRowsPerWarp>::kRows / kMeanFlowGroup;
        const int64_t first = block.index * kSamples;
        const int samples = row_count(first, a.rows, kSamples);
        const TileTape kept{&tape, 0, first, block.index};
        load_rows(block, tile, samples * kMeanFlowGroup, net.layers[0].in, [&](int r, int c) {
            const int64_t b = first + r / kMeanFlowGroup;
            if (r % kMeanFlowGroup == 1) return input_tangent(b, c);
            const float x = input(b, c);
            tape.input[b * tape.input_ld + c] = x;
            return x;
        });
        forward_tile(block, tile, net, 0, samples, 1, kept);
        block.each_warp([&](const Warp& warp) {
            for (int i = warp.index; i < samples; i += kWarps) {
                output_delta(warp, tile.x + kMeanFlowGroup * i * tile.ld, tile.ld,
                             tile.y + i * tile.ld_y, first + i, kept.output_delta(i, a.action_dim));
            }
        });
        tile.swap();
        backward_tile<true>(block, tile, net, samples, kept);
    }

    FLAME_BODY float input(int64_t b, int c) const {
        const int obs_end = net.layers[0].in - kTimeFeatures;
        if (c < a.action_dim) return a.z[b * a.action_dim + c];
        if (c < obs_end) return a.obs[b * a.obs_ld + c - a.action_dim];
        return time_feature(c - obs_end, a.t[b], a.r[b]).value;
    }

    FLAME_BODY float input_tangent(int64_t b, int c) const {
        const int obs_end = net.layers[0].in - kTimeFeatures;
        if (c < a.action_dim) return a.velocity[b * a.action_dim + c];
        return c < obs_end ? 0.0f : time_feature(c - obs_end, a.t[b], a.r[b]).derivative;
    }

    // u: outputs and, ld further on, their tangents; delta: zero to the padded end.
    FLAME_BODY void output_delta(const Warp& warp, const float* u, int u_ld, float* delta,
                                 int64_t b, float* kept) const {
        const float span = a.t[b] - a.r[b];
        const float* velocity = a.velocity + b * a.action_dim;
        const auto error = [&](int j) { return u[j] - (velocity[j] - span * u[u_ld + j]); };
        const double total = warp.sum<double>(a.action_dim, [&](int j) {
            const double e = static_cast<double>(error(j));
            return e * e;
        });
        warp.each(1, [&](int) { errors[b] = total; });
        warp.each(padded(a.action_dim), [&](int j) {
            delta[j] = j < a.action_dim ? 2.0f / static_cast<float>(a.rows) * error(j) : 0.0f;
            if (j < a.action_dim) kept[j] = delta[j];
        });
    }
};

struct MeanFlowLossKernel {
    static constexpr const char* kName = "meanflow_loss";
    const double* errors;
    int64_t rows;
    double* loss;

    FLAME_BODY void operator()(const Block& block) const {
        block.each_warp([&](const Warp& warp) {
            if (warp.index != 0) return;
            const double total =
                warp.sum<double>(static_cast<int>(rows), [&](int i) { return errors[i]; });
            warp.each(1, [&](int) { *loss = total / static_cast<double>(rows); });
        });
    }
};

struct MeanFlowMemory {
    TilePlan plan;
    Tape tape;
    double* errors;
};

static inline MeanFlowMemory carve_meanflow_step(const Launcher& launch, const MeanFlowStepArgs& a,
                                                 Carver& memory) {
    MeanFlowMemory m{};
    m.plan = plan_tiles(launch, a.spec, {a.rows, kMeanFlowGroup});
    m.tape = carve_tape(a.spec, a.rows, m.plan.tiles, true, memory);
    m.errors = memory.array<double>(a.rows);
    return m;
}

static inline void meanflow_step(const Launcher& launch, const MeanFlowStepArgs& a,
                                 Carver& memory) {
    const MeanFlowMemory m = carve_meanflow_step(launch, a, memory);
    with_rows(m.plan, [&](auto rows) {
        const MeanFlowStepKernel<decltype(rows)::value> kernel{make_view(a.spec, a.parameters), a,
                                                               m.tape, m.errors, m.plan.lds};
        launch(kernel, m.plan.tiles, m.plan.shared);
    });
    weight_gradients(launch, a.spec, m.tape, a.gradients);
    launch(MeanFlowLossKernel{m.errors, a.rows, a.loss}, 1, 0);
}

}  // namespace flame::FLAME_ISA
