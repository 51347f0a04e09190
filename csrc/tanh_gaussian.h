// The tanh-squashed Gaussian policy (Haarnoja et al. 2018): its samples, their log-density and the
// gradient. Plain C++: a few exponentials per coordinate, next to the network's products nothing.
#pragma once

#include <stdint.h>

namespace flame {

// action = tanh(mean + std noise) with log std = low + (high - low) / 2 (tanh(raw) + 1).
struct TanhGaussian {
    int64_t rows;
    int32_t action_dim;
    const float* output;  // (rows, 2 A) [mean | raw]
    const float* noise;   // (rows, A)
    float log_std_min;
    float log_std_max;
};

// action (rows, A), log_prob (rows)
void tanh_gaussian(const TanhGaussian& policy, float* action, float* log_prob);

// d_output (rows, 2 A): gradient of sum_b (d_action_b . a_b + d_log_prob_b log pi_b).
void tanh_gaussian_gradient(const TanhGaussian& policy, const float* d_action,
                            const float* d_log_prob, float* d_output);

}  // namespace flame
