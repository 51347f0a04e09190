// Adam's and the soft update's arithmetic: on vectors for the CPU's instruction sets, on single
// floats for CUDA (cuda/scalar.h).
#pragma once

#include <math.h>
#include <stdint.h>

#include "lanes.h"

namespace flame::FLAME_ISA {

struct AdamConstants {
    float rate1;  // 1 - beta1, rounded once
    float beta2;
    float rate2;           // 1 - beta2
    float step_size;       // learning_rate / (1 - beta1^step)
    float inverse_scale2;  // 1 / sqrt(1 - beta2^step)
    float epsilon;
};

// `step` counts from 1.
FLAME_INLINE AdamConstants adam_constants(int64_t step, double learning_rate, double beta1,
                                          double beta2, double epsilon) {
    const double correction1 = 1.0 - ::pow(beta1, static_cast<double>(step));
    const double correction2 = 1.0 - ::pow(beta2, static_cast<double>(step));
    return {static_cast<float>(1.0 - beta1),
            static_cast<float>(beta2),
            static_cast<float>(1.0 - beta2),
            static_cast<float>(learning_rate / correction1),
            static_cast<float>(1.0 / ::sqrt(correction2)),
            static_cast<float>(epsilon)};
}

// The order of operations is torch.optim.Adam's: denom = sqrt(v) / sqrt(1 - beta2^t) + eps.
FLAME_INLINE vf adam_update(vf p, vf g, vf& m, vf& v, const AdamConstants& k) {
    m = fma(splat(k.rate1), g - m, m);
    v = fma(splat(k.rate2) * g, g, splat(k.beta2) * v);
    const vf denominator = fma(sqrt(v), splat(k.inverse_scale2), splat(k.epsilon));
    return fma(splat(-k.step_size), m / denominator, p);
}

FLAME_INLINE vf soft_updated(vf target, vf online, float tau) {
    // From the nearer end, as torch.lerp: with tau = 1 it is a copy.
    const vf difference = online - target;
    return tau < 0.5f ? fma(splat(tau), difference, target)
                      : fma(splat(tau - 1.0f), difference, online);
}

}  // namespace flame::FLAME_ISA
