// One float vector type per instruction set, for the sources that are compiled once per set.
//
// Everything is static inside namespace FLAME_ISA, so that no function of one set can be linked
// into another. Arithmetic is written with the compiler's vector operators (+ - * / < & ?:); only
// what has no operator is named here. Functions take and return vectors by value; pointers need
// 4-byte (floats) or 2-byte (halves) alignment only.
#pragma once

#include <stdint.h>

#include "api.h"

#if !defined(FLAME_ISA)
#error "cpu/simd.h is for the sources in FLAME_ISA_SOURCES only"
#endif
#if defined(FLAME_ISA_AVX2) || defined(FLAME_ISA_AVX512)
#include <immintrin.h>
#endif

#define FLAME_INLINE static inline __attribute__((always_inline, unused))

namespace flame::FLAME_ISA {

#if defined(FLAME_ISA_AVX512)
constexpr int kLanes = 16;
#elif defined(FLAME_ISA_AVX2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef float vf_unaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));
typedef uint16_t vh_unaligned __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

FLAME_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
FLAME_INLINE void store(float* p, vf a) { *reinterpret_cast<vf_unaligned*>(p) = a; }
// Minus, not plus: x - 0 folds into one broadcast, x + 0 does not (x may be -0).
FLAME_INLINE vf splat(float a) { return a - vf{}; }
FLAME_INLINE vf zero() { return vf{}; }

// a * b + c, rounded once where the set has FMA.
FLAME_INLINE vf fma(vf a, vf b, vf c) {
#if defined(FLAME_ISA_AVX512)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(FLAME_ISA_AVX2)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

// A NaN in `a` gives `b` (as minps and maxps do).
FLAME_INLINE vf min(vf a, vf b) { return a < b ? a : b; }
FLAME_INLINE vf max(vf a, vf b) { return a > b ? a : b; }

FLAME_INLINE vf sqrt(vf a) {
#if defined(FLAME_ISA_AVX512)
    return _mm512_sqrt_ps(a);
#elif defined(FLAME_ISA_AVX2)
    return _mm256_sqrt_ps(a);
#else
    for (int i = 0; i < kLanes; ++i) a[i] = __builtin_sqrtf(a[i]);
    return a;
#endif
}

// Sum of all lanes, in a fixed order (halves are added pairwise).
FLAME_INLINE float sum(vf a) {
    float lanes[kLanes];
    store(lanes, a);
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}

FLAME_INLINE float max_lane(vf a) {
    float best = a[0];
    for (int i = 1; i < kLanes; ++i) best = a[i] > best ? a[i] : best;
    return best;
}

// kLanes IEEE half floats (finite ones: packing refuses the others) to float32, exactly.
FLAME_INLINE vf load_half(const uint16_t* p) {
#if defined(FLAME_ISA_AVX512)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(FLAME_ISA_AVX2)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    // Exponent and mantissa move to their float32 place; the product mends the exponent's bias and
    // turns subnormal halves into normal floats.
    const vi h = __builtin_convertvector(*reinterpret_cast<const vh_unaligned*>(p), vi);
    const vi magnitude = (h & 0x7FFF) << 13;
    const vf value = reinterpret_cast<vf>(magnitude) * 0x1p112f;
    return reinterpret_cast<vf>(reinterpret_cast<vi>(value) | ((h & 0x8000) << 16));
#endif
}

// e^x to 2 ulp; x is clamped to [-87.3, 88.7], so the result is a positive normal float.
FLAME_INLINE vf exp(vf x) {
    x = min(max(x, splat(-87.3f)), splat(88.7f));
    const vf shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
    const vf shifted = fma(x, splat(1.44269504f), shift);
    const vf n = shifted - shift;
    vf r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    vf p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1.0f;
    // The low bits of `shifted` are n. 2^n in two factors, because 2^128 is no float.
    const vi bits = reinterpret_cast<vi>(shifted) - 0x4B400000;
    const vi half = bits >> 1;
    const vf scale0 = reinterpret_cast<vf>((half + 127) << 23);
    const vf scale1 = reinterpret_cast<vf>((bits - half + 127) << 23);
    return p * scale0 * scale1;
}

// --- Activations and their derivatives
// ------------------------------------------------------------

struct ValueGrad {
    vf value;
    vf grad;
};

// mish(x) = x tanh(log(1 + e^x)) = x n / (n + 2) with n = e (e + 2), e = e^x. The division comes
// before the product with x (x n overflows); above 20 the factor is 1 in float32, below -87 it is
// 0.
FLAME_INLINE vf mish(vf x) {
    const vf e = exp(min(x, splat(20.0f)));
    const vf n = e * (e + 2.0f);
    return x * (x < -87.0f ? zero() : n / (n + 2.0f));
}

// mish' = T + x (1 - T^2) sigmoid(x) with T = n / (n + 2), that is T + 4 x e (e + 1) / (n + 2)^2.
FLAME_INLINE ValueGrad mish_grad(vf x) {
    const vf e = exp(min(x, splat(20.0f)));
    const vf n = e * (e + 2.0f);
    const vf q = 1.0f / (n + 2.0f);
    const vf t = x < -87.0f ? zero() : n * q;
    return {x * t, fma(x * q, (4.0f * e) * ((e + 1.0f) * q), t)};
}

FLAME_INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

FLAME_INLINE vf silu(vf x) { return x * (x < -87.0f ? zero() : sigmoid(x)); }

FLAME_INLINE ValueGrad silu_grad(vf x) {
    const vf s = x < -87.0f ? zero() : sigmoid(x);
    const vf value = x * s;
    return {value, fma(value, 1.0f - s, s)};
}

// NaN stays NaN, as in PyTorch.
FLAME_INLINE vf relu(vf x) { return x < 0.0f ? zero() : x; }

template <Activation kind>
FLAME_INLINE vf activate(vf x) {
    if constexpr (kind == Activation::kRelu) return relu(x);
    if constexpr (kind == Activation::kSilu) return silu(x);
    if constexpr (kind == Activation::kMish) return mish(x);
}

template <Activation kind>
FLAME_INLINE ValueGrad activate_grad(vf x) {
    if constexpr (kind == Activation::kRelu) return {relu(x), x > 0.0f ? splat(1.0f) : zero()};
    if constexpr (kind == Activation::kSilu) return silu_grad(x);
    if constexpr (kind == Activation::kMish) return mish_grad(x);
}

}  // namespace flame::FLAME_ISA
