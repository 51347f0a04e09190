// Argument structs of the training kernels (csrc/cpu/*). Conventions of api.h; in addition
// `parameters` and `gradients` are flat buffers laid out as mlp_spec.h says, and a kernel ADDS to
// `gradients`.
#pragma once

#include <stdint.h>

#include "mlp_spec.h"

namespace flame {

// output[m, b, :] = MLP_m(input[b, :])
struct MlpForwardArgs {
    MlpSpec spec;
    const float* parameters;
    int64_t rows;
    const float* input;  // (rows, in)
    int64_t input_ld;
    float* output;  // (members, rows, out)
};

// Q of K candidate actions per state; input columns are [action (A) | observation (O)].
struct TwinQArgs {
    MlpSpec spec;
    const float* parameters;
    int64_t states;
    int32_t candidates;
    int32_t action_dim;
    const float* obs;  // (states, O)
    int64_t obs_ld;
    const float* actions;  // (states, K, A), dense
    float* q_min;          // (states, K)
    float* q_each;         // (members, states, K) or null
};

// sum_m mean_b (Q_m(s_b, a_b) - target_b)^2: adds its gradient, reports per member.
struct CriticStepArgs {
    MlpSpec spec;
    const float* parameters;
    float* gradients;
    int64_t rows;
    int32_t action_dim;
    const float* obs;  // (rows, O)
    int64_t obs_ld;
    const float* action;  // (rows, A)
    int64_t action_ld;
    const float* target;  // (rows)
    double* loss;         // (members)
    double* q_mean;       // (members)
    float* q;             // (members, rows) or null
};

// torch.optim.Adam without weight decay; `step` counts from 1.
struct AdamArgs {
    int64_t count;
    float* parameters;
    const float* gradients;
    float* first_moment;
    float* second_moment;
    int64_t step;
    double learning_rate;
    double beta1;
    double beta2;
    double epsilon;
};

// target <- target + tau (online - target)
struct SoftUpdateArgs {
    int64_t count;
    float* target;
    const float* online;
    float tau;
};

}  // namespace flame
