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
FLAME_INLINE vf sqrt(vf a) { return sqrtf(a); }
FLAME_INLINE vf exp_bounded(vf x) { return expf(x); }

// Of cpu/simd_double.h.
constexpr int kDoubles = 1;
using vd = double;
using vl = bool;
using vu = uint64_t;

FLAME_INLINE vd splat_d(double a) { return a; }
FLAME_INLINE vd sqrt_d(vd a) { return ::sqrt(a); }
FLAME_INLINE bool any(vl mask) { return mask; }
FLAME_INLINE double lane(vd a, int) { return a; }
FLAME_INLINE void set_lane(vd& a, int, double value) { a = value; }

#if defined(__CUDACC__)
FLAME_INLINE vu bits_of(vd a) { return static_cast<vu>(__double_as_longlong(a)); }
FLAME_INLINE vd double_of(vu a) { return __longlong_as_double(static_cast<int64_t>(a)); }
#else
FLAME_INLINE vu bits_of(vd a) {
    vu b;
    __builtin_memcpy(&b, &a, sizeof(b));
    return b;
}
FLAME_INLINE vd double_of(vu a) {
    vd b;
    __builtin_memcpy(&b, &a, sizeof(b));
    return b;
}
#endif

}  // namespace flame::FLAME_ISA
