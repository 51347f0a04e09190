// How a policy's network turns base noise into actions.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <vector>

#include "cpu/policy_act.h"
#include "cpu/training.h"

namespace flame {

// A tanh Gaussian, steps along a flow, or denoising steps.
struct PolicySampler {
    MlpSpec spec;
    int32_t action_dim;
    float log_std_min;  // of the Gaussian
    float log_std_max;
    int32_t steps;  // 0 for the Gaussian
    int32_t time_features;
    std::vector<float> time;         // (steps, time_features)
    std::vector<float> scale;        // (steps) along a flow, else empty
    std::vector<ActStep> denoising;  // (steps) that have no density, else empty

    bool is_flow() const { return !scale.empty(); }
};

// One sample along the flow per row; the caller says which density and where results go.
inline FlowDensityArgs flow_samples(const PolicySampler& policy, const float* parameters,
                                    int64_t rows, const float* obs, int64_t obs_ld,
                                    const float* noise) {
    FlowDensityArgs args{};
    args.spec = policy.spec;
    args.parameters = parameters;
    args.states = rows;
    args.samples = 1;
    args.action_dim = policy.action_dim;
    args.obs = obs;
    args.obs_ld = obs_ld;
    args.noise = noise;
    args.steps = policy.steps;
    args.time_features = policy.time_features;
    args.time = policy.time.data();
    args.scale = policy.scale.data();
    return args;
}

// Actions (rows, A) in the box from dense noise (rows, A) and, where log_prob is not null, their
// exact log-density (rows), which a denoising policy does not have.
void sample_actions(const PolicySampler& policy, const float* parameters, int64_t rows,
                    const float* obs, int64_t obs_ld, const float* noise, float* action,
                    float* log_prob);

}  // namespace flame
