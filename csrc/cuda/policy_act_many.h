// Best of N actions for many rows (states times particles): tiles through the policy's steps,
// twin_q of the candidates, a warp per state that chooses. One launch without a choice, four with
// one.
//
// Workspace, with several samples: candidates (states, samples, A) and q (states, samples) floats
// and twin_q's.
//
// Operations 2 rows (weights) per step and twin_q's. 16384 states, 55 -> 3 x 256 -> 6: 4.8 GFLOP,
// floor 72 us at 67 TFLOP/s; inputs and outputs 1.9 MB.
#pragma once

#include "cuda/best_action.h"
#include "cuda/flow_step.h"
#include "cuda/twin_q.h"
#include "partition.h"
#include "scalar_rules.h"

namespace flame::FLAME_ISA {

template <int kRowsPerWarp>
struct FlowActionKernel : FlowStep {
    static constexpr const char* kName = "flow_action";

    FLAME_BODY void operator()(const Block& block) const {
        auto tile = make_tile<kRowsPerWarp>(block, lds);
        const int64_t first = block.index * samples;
        const int rows = row_count(first, a.states * a.samples, samples);
        const int n = a.action_dim;
        const float* noise = a.noise + first * n;
        float* z = a.action + first * n;
        block.each_thread([&](int t) {
            for (int i = t; i < rows * n; i += kThreads) z[i] = noise[i];
        });
        for (int step = 0; step < a.steps; ++step) {
            tile = make_tile<kRowsPerWarp>(block, lds);
            load_rows(block, tile, rows, net.layers[0].in,
                      [&](int r, int c) { return input(first + r, step, c); });
            forward_tile(block, tile, net, 0, rows, 0, NoTape{});
            const float scale = a.scale[step];
            const bool last = step + 1 == a.steps;
            block.each_thread([&](int t) {
                for (int i = t; i < rows * n; i += kThreads) {
                    const float next = fmaf(scale, tile.x[i / n * tile.ld + i % n], z[i]);
                    z[i] = last ? into_box(next) : next;
                }
            });
        }
    }
};

// One warp per state.
struct ChooseActionKernel {
    static constexpr const char* kName = "choose_action";
    PolicyActArgs a;
    const float* candidates;
    const float* q;

    FLAME_BODY void operator()(const Block& block) const {
        block.each_warp([&](const Warp& warp) {
            const int64_t state = block.index * kWarps + warp.index;
            if (state >= a.states) return;
            const int64_t first = state * a.samples;
            choose_action(warp, a, state, q + first, candidates + first * a.action_dim);
        });
    }
};

struct ManyMemory {
    float* candidates;
    float* q;
    TwinQArgs twin_q;
};

static inline ManyMemory carve_many(const PolicyActArgs& a, Carver& memory) {
    if (a.samples == 1) return {};
    const size_t rows = static_cast<size_t>(a.states) * a.samples;
    ManyMemory m{};
    m.candidates = memory.floats(rows * a.action_dim);
    m.q = memory.floats(rows);
    m.twin_q = {a.critics, a.critic_parameters, a.states, a.samples, a.action_dim, a.obs,
                a.obs_ld,  m.candidates,        m.q,      nullptr};
    return m;
}

static inline void act_many(const Launcher& launch, const PolicyActArgs& a, Carver& memory) {
    const ManyMemory m = carve_many(a, memory);
    FlowDensityArgs flow{};
    flow.spec = a.policy;
    flow.parameters = a.parameters;
    flow.states = a.states;
    flow.samples = a.samples;
    flow.action_dim = a.action_dim;
    flow.obs = a.obs;
    flow.obs_ld = a.obs_ld;
    flow.noise = a.noise;
    flow.steps = a.steps;
    flow.time_features = a.time_features;
    flow.time = a.time;
    flow.scale = a.scale;
    flow.divergence = Divergence::kNone;
    flow.action = a.samples > 1 ? m.candidates : a.action;
    const TilePlan plan = plan_flow_step(launch, flow);
    with_rows(plan, [&](auto rows_per_warp) {
        const FlowActionKernel<decltype(rows_per_warp)::value> kernel{make_flow_step(flow, plan)};
        launch(kernel, plan.tiles, plan.shared);
    });
    if (a.samples == 1) return;
    twin_q(launch, m.twin_q, a.tensor_cores, memory);
    launch(ChooseActionKernel{a, m.candidates, m.q}, divide_up(a.states, kWarps), 0);
}

}  // namespace flame::FLAME_ISA
