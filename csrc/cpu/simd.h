// One float vector type per instruction set, for the sources that are compiled once per set.
//
// Everything is static inside namespace FLAME_ISA, so that no function of one set can be linked
// into another. Arithmetic is written with the compiler's vector operators (+ - * / < & ?:); only
// what has no operator is named here. Functions take and return vectors by value; pointers need
// 4-byte (floats) or 2-byte (halves) alignment only.
#pragma once

#include <stdint.h>

#if defined(FLAME_ISA_AVX512_BF16)
#define FLAME_ISA_AVX512 1
#endif
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
typedef int32_t vi_unaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
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

// A NaN in either gives `b`.
FLAME_INLINE vf min(vf a, vf b) {
#if defined(FLAME_ISA_AVX512)
    return _mm512_min_ps(a, b);
#elif defined(FLAME_ISA_AVX2)
    return _mm256_min_ps(a, b);
#else
    return a < b ? a : b;
#endif
}

FLAME_INLINE vf max(vf a, vf b) {
#if defined(FLAME_ISA_AVX512)
    return _mm512_max_ps(a, b);
#elif defined(FLAME_ISA_AVX2)
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

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
#if defined(FLAME_ISA_AVX2) || defined(FLAME_ISA_AVX512)
FLAME_INLINE float sum(vf a) {
#if defined(FLAME_ISA_AVX512)
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
#else
    const __m256 eight = a;
#endif
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#else
FLAME_INLINE float sum(vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }
#endif

// kLanes IEEE half floats (finite ones: packing refuses the others) to float32, exactly.
FLAME_INLINE vf load_half(const uint16_t* p) {
#if defined(FLAME_ISA_AVX512)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(FLAME_ISA_AVX2)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    // Exponent and mantissa move to their float32 place with the exponent's bias mended; subnormal
    // halves are counts of 2^-24. No subnormal float occurs: the process may flush those to zero.
    const vi h = __builtin_convertvector(*reinterpret_cast<const vh_unaligned*>(p), vi);
    const vi code = h & 0x7FFF;
    const vf normal = reinterpret_cast<vf>((code << 13) + (112 << 23));
    const vf tiny = __builtin_convertvector(code, vf) * 0x1p-24f;
    const vf value = code < 0x400 ? tiny : normal;
    return reinterpret_cast<vf>(reinterpret_cast<vi>(value) | ((h & 0x8000) << 16));
#endif
}

// Of kLanes words of two bfloat16, the lower and the upper ones as float32.
FLAME_INLINE void load_bfloat_pairs(const uint32_t* p, vf& low, vf& high) {
    const vi words = *reinterpret_cast<const vi_unaligned*>(p);
    low = reinterpret_cast<vf>(words << 16);
    high = reinterpret_cast<vf>(words & static_cast<int32_t>(0xFFFF0000u));
}

// exp(x) for -87 <= x <= 88, relative error below 2e-7: 2^k 2^f with k the nearest integer to
// x / ln 2 and a minimax polynomial on |f| <= 1/2 (coefficients fitted for this project). The range
// reduction needs a fused multiply-add; without one, ln 2 is taken off in two parts (Cephes expf).
FLAME_INLINE vf exp_bounded(vf x) {
#if defined(FLAME_ISA_AVX2) || defined(FLAME_ISA_AVX512)
    const vf shift = splat(12582912.0f);  // 1.5 * 2^23: rounds to an integer in the low bits
    const vf log2e = splat(1.44269502f);
    const vf t = fma(x, log2e, shift);
    const vf k = t - shift;
    const vf f = fma(x, splat(1.92596299e-8f), fma(x, log2e, -k));
    vf p = splat(1.5345811897e-4f);
    p = fma(p, f, splat(1.3399931218e-3f));
    p = fma(p, f, splat(9.6184889575e-3f));
    p = fma(p, f, splat(5.5503287770e-2f));
    p = fma(p, f, splat(2.4022646891e-1f));
    p = fma(p, f, splat(6.9314720574e-1f));
    p = fma(p, f, splat(1.0f));
    // The low bits of t are k; adding them to the exponent multiplies by 2^k.
    return reinterpret_cast<vf>(reinterpret_cast<vi>(p) + (reinterpret_cast<vi>(t) << 23));
#else
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
    // The low bits of `shifted` are n (its upper bits leave with the shift).
    return reinterpret_cast<vf>(reinterpret_cast<vi>(p) + (reinterpret_cast<vi>(shifted) << 23));
#endif
}

}  // namespace flame::FLAME_ISA
