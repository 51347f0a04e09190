// How a policy's network turns base noise into actions.
#pragma once

#include <stdint.h>

#include <vector>

#include "mlp_spec.h"

namespace flame {

// A tanh Gaussian, or steps along a flow.
struct PolicySampler {
    MlpSpec spec;
    int32_t action_dim;
    float log_std_min;  // of the Gaussian
    float log_std_max;
    int32_t steps;  // of the flow; 0 for the Gaussian
    int32_t time_features;
    std::vector<float> time;   // (steps, time_features)
    std::vector<float> scale;  // (steps)
};

}  // namespace flame
