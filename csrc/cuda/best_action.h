// What acting has in common for few rows and for many: the choice of a particle.
#pragma once

#include <math.h>

#include "cuda/block.h"
#include "cuda/training.h"

namespace flame::FLAME_ISA {

// A state's action: the one of its candidates (samples, A) with the largest q (samples).
FLAME_INLINE void choose_action(const Warp& warp, const PolicyActArgs& a, int64_t state,
                                const float* q, const float* candidates) {
    const int best = first_largest(warp, a.samples, -HUGE_VALF, [&](int k) { return q[k]; });
    warp.each(a.action_dim, [&](int j) {
        a.action[state * a.action_dim + j] = candidates[best * a.action_dim + j];
    });
}

}  // namespace flame::FLAME_ISA
