// The names of cpu/simd.h for one lane, so that formulas written for vectors serve a CUDA thread.
#pragma once

#include <math.h>
#include <stdint.h>

#include "cuda/target.h"

namespace flame::FLAME_ISA {

using vf = float;

FLAME_INLINE vf splat(float a) { return a; }
FLAME_INLINE vf zero() { return 0.0f; }
FLAME_INLINE vf fma(vf a, vf b, vf c) { return fmaf(a, b, c); }
// A NaN in either gives `b`, as in cpu/simd.h.
FLAME_INLINE vf min(vf a, vf b) { return a < b ? a : b; }
FLAME_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
FLAME_INLINE vf exp_bounded(vf x) { return expf(x); }

}  // namespace flame::FLAME_ISA
