// Scalar parts of the reverse candidates (FLAME, Sec. 4.1) that the CPU and the CUDA kernels share.
#pragma once

#include <math.h>

#include "philox.h"

namespace flame {

constexpr double kLeastSignal = 1e-3;  // below, the posterior over actions is uniform

FLAME_HD bool posterior_is_uniform(float signal) {
    return static_cast<double>(signal) < kLeastSignal;
}

// Uniforms stay inside (0, 1).
FLAME_HD double inside_unit(double u) {
    constexpr double kLargest = 1.0 - 0x1p-25;
    return u > kLargest ? kLargest : (u < 0x1p-30 ? 0x1p-30 : u);
}

// Point k of a shifted lattice: frac(shift + k step).
FLAME_HD double lattice_point(double shift, int64_t k, double step) {
    const double u = shift + static_cast<double>(k) * step;
    return u - ::floor(u);
}

struct ReverseCandidate {
    float action;
    float noise;
};

// One coordinate; z = signal action + scale noise holds to float rounding. `x` is the truncated
// normal draw of `u`, not read where the posterior is uniform.
FLAME_HD ReverseCandidate reverse_candidate(float z, float signal, float scale, double u,
                                            double x) {
    const double at = static_cast<double>(z);
    double value = posterior_is_uniform(signal)
                       ? 2.0 * u - 1.0
                       : (at - static_cast<double>(scale) * x) / static_cast<double>(signal);
    value = value > 1.0 ? 1.0 : (value < -1.0 ? -1.0 : value);
    const float action = static_cast<float>(value);
    return {action,
            static_cast<float>((at - static_cast<double>(signal) * static_cast<double>(action)) /
                               static_cast<double>(scale))};
}

// Gumbel's maximum: the candidate with the largest key is a draw by the softmax of the logits.
FLAME_HD double gumbel_key(double logit, uint32_t bits) {
    return logit - ::log(-::log(static_cast<double>(uniform_from_bits(bits))));
}

// Generator of the R_d sequence in n dimensions (Roberts 2018): g_j = phi^-(j + 1) with
// phi^(n + 1) = phi + 1. Host only.
static inline void lattice_steps(int n, double* steps) {
    double phi = 2.0;
    for (int i = 0; i < 60; ++i) phi = ::pow(1.0 + phi, 1.0 / (n + 1));
    double g = 1.0;
    for (int j = 0; j < n; ++j) {
        g /= phi;
        steps[j] = g;
    }
}

}  // namespace flame
