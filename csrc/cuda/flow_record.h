// One step along the flow with its exact log-density, recorded for flow_backward.h: a launch of
// flow_density.h's step that keeps its inputs, its activations and their tangents.
//
// obs (rows, O) with row distance obs_ld; noise and action (rows, A) dense; time (1,
// time_features), scale (1); log_prob, folded (rows), transport (rows, A, A): device memory
// of the caller. One sample per state; divergence kLogDet. The record is workspace that the caller
// keeps until the backward pass, per row about 4 (2 A + 3) bytes per hidden unit. The parameters
// are not in it: they must still be the same then.
//
// Operations 2 rows (1 + A) (weights), as forward only: 256 rows, A 6, 55 -> 3 x 256 -> 6, 0.53
// GFLOP, floor 7.9 us at 67 TFLOP/s; the record is 12 MB, 3.7 us at 3.35 TB/s if it left L2. LU and
// inverse take about 3 A^3 double operations per sample, a warp each: the LU in one lane, the
// inverse's columns in as many as there are.
#pragma once

#include "cuda/flow_step.h"
#include "partition.h"

namespace flame::FLAME_ISA {

template <int kRowsPerWarp>
struct FlowRecordKernel : FlowStep {
    static constexpr const char* kName = "flow_record";
    FlowRecord record;

    FLAME_BODY void operator()(const Block& block) const {
        auto tile = make_tile<kRowsPerWarp>(block, lds);
        const Tape& tape = record.tape;
        const int64_t first = block.index * samples;
        const int count = row_count(first, a.states, samples);
        block.each_thread([&](int t) {
            if (t < count) start(first + t);
        });
        load_rows(block, tile, count * tape.group, net.layers[0].in, [&](int r, int c) {
            const float x = row_input(first, r, 0, c);
            tape.input[(first * tape.group + r) * tape.input_ld + c] = x;
            return x;
        });
        forward_tile(block, tile, net, 0, count, tangents,
                     TangentTileTape{{&tape, 0, first, block.index}});
        block.each_warp([&](const Warp& warp) {
            for (int i = warp.index; i < count; i += kWarps) {
                const int at = i * tape.group;
                finish_sample(warp, tile.x + at * tile.ld, tile.ld, tile.y + at * tile.ld_y,
                              first + i);
            }
        });
    }

    // u: outputs and, u_ld further on each, their tangents, whose rows are then scratch, as the
    // sample's rows of the tile's other buffer are.
    FLAME_BODY void finish_sample(const Warp& warp, float* u, int u_ld, float* scratch,
                                  int64_t b) const {
        const int n = a.action_dim;
        const double q = static_cast<double>(a.scale[0]);
        warp.each(
            n, [&](int j) { a.action[b * n + j] = fmaf(a.scale[0], u[j], a.action[b * n + j]); });
        double* m = reinterpret_cast<double*>(scratch);
        warp.each(n * n, [&](int e) {
            m[e] = transport(u, u_ld, q, e / n, e % n);
            a.transport[b * n * n + e] = static_cast<float>(m[e]);
        });
        int* pivot = reinterpret_cast<int*>(m + n * n);
        warp.each(1, [&](int) {
            const LogDet det = lu_factor(m, n, pivot);
            a.log_prob[b] -= static_cast<float>(det.log_abs);
            a.folded[b] = det.negative;
        });
        warp.each(n, [&](int column) {
            double* x = reinterpret_cast<double*>(u) + column * n;
            lu_inverse_column(m, pivot, n, column, x);
            float* to = record.jacobian_gradient + b * n * n + column;
            for (int j = 0; j < n; ++j) to[j * n] = static_cast<float>(-q * x[j]);
        });
    }
};

static inline void flow_record(const Launcher& launch, const FlowDensityArgs& a, Carver& memory) {
    if (a.states == 0) return;
    const FlowRecord record = carve_flow_record(a, memory);
    const TilePlan plan = plan_flow_step(launch, a);
    with_rows(plan, [&](auto rows_per_warp) {
        const FlowRecordKernel<decltype(rows_per_warp)::value> kernel{make_flow_step(a, plan),
                                                                      record};
        launch(kernel, plan.tiles, plan.shared);
    });
}

}  // namespace flame::FLAME_ISA
