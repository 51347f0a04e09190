// Vectors of doubles, for the few formulas that need them (truncated_normal.h).
#pragma once

#include <string.h>

#include "cpu/simd.h"

#define FLAME_UNROLL _Pragma("GCC unroll 8")

namespace flame::FLAME_ISA {

constexpr int kDoubles = kLanes / 2;
typedef double vd __attribute__((vector_size(kDoubles * 8)));
typedef int64_t vl __attribute__((vector_size(kDoubles * 8)));
typedef uint64_t vu __attribute__((vector_size(kDoubles * 8)));

FLAME_INLINE vd splat_d(double a) { return a - vd{}; }

FLAME_INLINE vd load_d(const double* p) {
    vd a;
    memcpy(&a, p, sizeof(a));
    return a;
}

FLAME_INLINE void store_d(double* p, vd a) { memcpy(p, &a, sizeof(a)); }

FLAME_INLINE vd sqrt_d(vd a) {
    for (int i = 0; i < kDoubles; ++i) a[i] = __builtin_sqrt(a[i]);
    return a;
}

FLAME_INLINE bool any(vl mask) {
    int64_t found = 0;
    for (int i = 0; i < kDoubles; ++i) found |= mask[i];
    return found != 0;
}

FLAME_INLINE vu bits_of(vd a) { return reinterpret_cast<vu>(a); }
FLAME_INLINE vd double_of(vu a) { return reinterpret_cast<vd>(a); }
FLAME_INLINE double lane(vd a, int i) { return a[i]; }
FLAME_INLINE void set_lane(vd& a, int i, double value) { a[i] = value; }

}  // namespace flame::FLAME_ISA
