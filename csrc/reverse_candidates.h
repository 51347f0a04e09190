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

// The rank of order[k] among `count` draws, equal ones in the order of their index.
FLAME_HD int rank_of(const float* order, int count, int k) {
    const float own = order[k];
    int rank = 0;
    for (int i = 0; i < k; ++i) rank += order[i] <= own ? 1 : 0;
    for (int i = k + 1; i < count; ++i) rank += order[i] < own ? 1 : 0;
    return rank;
}

// A place within stratum `rank` of `count` equal ones (McKay, Beckman and Conover 1979).
FLAME_HD double in_stratum(int rank, int count, double u) {
    return (static_cast<double>(rank) + u) / static_cast<double>(count);
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

}  // namespace flame
