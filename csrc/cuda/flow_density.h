// Samples of a flow policy with their log-density, forward only: any number of steps and samples
// per state in one launch. A block carries its samples, each with its tangents, through all steps.
//
// obs (states, O); noise, action, probe (rows, A) dense, rows = states * samples; time (steps,
// time_features), scale (steps); log_prob, folded (rows): device memory of the caller. No
// workspace.
//
// log|det(I + q J)| comes from A forward tangents and an LU in double in shared memory, one thread
// per sample. Operations 2 rows (1 + A) (weights): 256 rows, A 6, 55 -> 3 x 256 -> 6: 0.53 GFLOP,
// floor 7.9 us at 67 TFLOP/s; inputs and outputs 0.1 MB.
#pragma once

#include "cuda/flow_step.h"
#include "partition.h"

namespace flame::FLAME_ISA {

template <int kRowsPerWarp>
struct FlowDensityKernel : FlowStep {
    static constexpr const char* kName = "flow_density";

    FLAME_BODY void operator()(const Block& block) const {
        auto tile = make_tile<kRowsPerWarp>(block, lds);
        const int64_t first = block.index * samples;
        const int count = row_count(first, a.states * a.samples, samples);
        const int group = 1 + tangents;
        block.each_thread([&](int t) {
            if (t < count) start(first + t);
        });
        for (int step = 0; step < a.steps; ++step) {
            tile = make_tile<kRowsPerWarp>(block, lds);
            load_rows(block, tile, count * group, net.layers[0].in,
                      [&](int r, int c) { return row_input(first, r, step, c); });
            forward_tile(block, tile, net, 0, count, tangents, NoTape{});
            block.each_thread([&](int t) {
                if (t < count) advance(tile, step, t, first + t);
            });
        }
    }

    // z <- z + q u and the step's share of the log-density, by one thread.
    FLAME_BODY void advance(const Tile<kRowsPerWarp>& tile, int step, int i, int64_t b) const {
        const int n = a.action_dim;
        const float* u = tile.x + i * (1 + tangents) * tile.ld;
        const double q = static_cast<double>(a.scale[step]);
        for (int j = 0; j < n; ++j) {
            a.action[b * n + j] = fmaf(a.scale[step], u[j], a.action[b * n + j]);
        }
        if (a.divergence == Divergence::kLogDet) {
            double* m = reinterpret_cast<double*>(tile.y) + static_cast<int64_t>(i) * n * n;
            for (int j = 0; j < n; ++j) {
                for (int k = 0; k < n; ++k) m[k * n + j] = transport(u, tile.ld, q, k, j);
            }
            int pivot[kMaxActions];
            const LogDet det = lu_factor(m, n, pivot);
            a.log_prob[b] -= static_cast<float>(det.log_abs);
            a.folded[b] = a.folded[b] != det.negative;
        } else if (tangents > 0) {
            a.log_prob[b] -= static_cast<float>(q * divergence(u, tile.ld, b));
        }
    }

    // tr J, or probe' J probe.
    FLAME_BODY double divergence(const float* u, int u_ld, int64_t b) const {
        const bool probed = a.divergence == Divergence::kProbe;
        double total = 0.0;
        for (int j = 0; j < a.action_dim; ++j) {
            total += probed ? static_cast<double>(a.probe[b * a.action_dim + j]) *
                                  static_cast<double>(u[u_ld + j])
                            : static_cast<double>(u[(1 + j) * u_ld + j]);
        }
        return total;
    }
};

static inline void flow_density(const Launcher& launch, const FlowDensityArgs& a) {
    if (a.states * a.samples == 0) return;
    const TilePlan plan = plan_flow_step(launch, a);
    with_rows(plan, [&](auto rows_per_warp) {
        const FlowDensityKernel<decltype(rows_per_warp)::value> kernel{make_flow_step(a, plan)};
        launch(kernel, plan.tiles, plan.shared);
    });
}

}  // namespace flame::FLAME_ISA
