// What the kernels of a flow's samples and densities share: a step's inputs, the tiles, the record
// that a gradient needs.
#pragma once

#include "cpu/training.h"
#include "cuda/tangent_tape.h"
#include "scalar_rules.h"
#include "small_lu.h"

namespace flame::FLAME_ISA {

struct FlowStep {
    MlpView net;
    FlowDensityArgs a;
    int tangents;
    int samples;  // per tile
    TileLds lds;

    // The sample's action begins as its noise.
    FLAME_BODY void start(int64_t b) const {
        double squares = 0.0;
        for (int64_t i = b * a.action_dim; i < (b + 1) * a.action_dim; ++i) {
            a.action[i] = a.noise[i];
            squares += static_cast<double>(a.noise[i]) * static_cast<double>(a.noise[i]);
        }
        a.log_prob[b] = static_cast<float>(-0.5 * squares - a.action_dim * kHalfLog2Pi);
        a.folded[b] = false;
    }

    // Column c of a tile's row r, whose first sample is `first`.
    FLAME_BODY float row_input(int64_t first, int r, int step, int c) const {
        const int group = 1 + tangents;
        const int64_t b = first + r / group;
        return r % group == 0 ? input(b, step, c) : input_tangent(b, r % group - 1, c);
    }

    FLAME_BODY float input(int64_t b, int step, int c) const {
        const int obs_end = net.layers[0].in - a.time_features;
        if (c < a.action_dim) return a.action[b * a.action_dim + c];
        if (c < obs_end) return a.obs[b / a.samples * a.obs_ld + c - a.action_dim];
        return a.time[static_cast<int64_t>(step) * a.time_features + c - obs_end];
    }

    FLAME_BODY float input_tangent(int64_t b, int t, int c) const {
        if (c >= a.action_dim) return 0.0f;
        if (a.divergence == Divergence::kProbe) return a.probe[b * a.action_dim + c];
        return c == t ? 1.0f : 0.0f;
    }

    // Element (k, j) of I + q J: output k of tangent j.
    static FLAME_BODY double transport(const float* u, int u_ld, double q, int k, int j) {
        return (k == j ? 1.0 : 0.0) + q * static_cast<double>(u[(1 + j) * u_ld + k]);
    }
};

static inline int tangent_count(const FlowDensityArgs& a) {
    if (a.divergence == Divergence::kNone) return 0;
    return a.divergence == Divergence::kProbe ? 1 : a.action_dim;
}

// Wide enough for a sample's A x A matrix of doubles, with A pivots, in its rows of either buffer.
static inline TilePlan plan_flow_step(const Launcher& launch, const FlowDensityArgs& a) {
    return plan_tiles(launch, a.spec,
                      {a.states * a.samples, 1 + tangent_count(a), 1, 0, 2 * a.action_dim});
}

static inline FlowStep make_flow_step(const FlowDensityArgs& a, const TilePlan& plan) {
    return {make_view(a.spec, a.parameters), a, tangent_count(a), plan.samples, plan.lds};
}

struct FlowRecord {
    Tape tape;
    float* jacobian_gradient;  // (rows, A, A): d log pi / dJ[a][j] at [j][a]
};

static inline FlowRecord carve_flow_record(const FlowDensityArgs& a, Carver& memory) {
    FlowRecord record{};
    record.tape = carve_values(a.spec, a.states, 1 + a.action_dim, memory);
    carve_input(a.spec, record.tape, memory);
    record.jacobian_gradient =
        memory.floats(static_cast<size_t>(a.states) * a.action_dim * a.action_dim);
    return record;
}

}  // namespace flame::FLAME_ISA
