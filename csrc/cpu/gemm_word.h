// What the operands of a product are made of: 32-bit words of one float each or, in the build for
// bfloat16 products, of two bfloat16 that follow each other in depth (the lower one first).
#pragma once

#include <stddef.h>

#include "cpu/simd.h"
#include "float_bits.h"
#include "partition.h"

namespace flame::FLAME_ISA {

#if defined(FLAME_ISA_AVX512_BF16)
constexpr int kWordDepth = 2;
typedef uint32_t GemmWord;
typedef __m512i GemmWords;

FLAME_INLINE GemmWords load_words(const GemmWord* p) { return _mm512_loadu_si512(p); }
FLAME_INLINE GemmWords splat_word(GemmWord word) {
    return _mm512_set1_epi32(static_cast<int>(word));
}

// acc + low(a) low(b) + high(a) high(b), products exact, subnormal numbers taken as zero.
FLAME_INLINE vf multiply_add(GemmWords a, GemmWords b, vf acc) {
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}

// Value `depth` of the two that a word holds.
FLAME_INLINE float word_value(GemmWord word, int depth) {
    return bits_to_float(depth % 2 == 0 ? word << 16 : word & 0xFFFF0000u);
}

FLAME_INLINE __mmask16 first_lanes(int n) {
    return static_cast<__mmask16>(n >= kLanes ? 0xFFFF : n > 0 ? (1 << n) - 1 : 0);
}

// to[i] = (row[first + 2 i], row[first + 2 i + 1]) of n values, rounded to the nearest. Zero stands
// for a value before row[0] (first is at least -1) and beside an odd last one.
static inline void round_range(const float* row, int first, int n, GemmWord* to) {
    for (int c = 0; c < n; c += 2 * kLanes) {
        const float* from = row + (first + c);
        const auto before = static_cast<__mmask16>(first + c < 0);
        const auto lanes = static_cast<__mmask16>(first_lanes(n - c) & ~before);
        const __m512 low = _mm512_maskz_loadu_ps(lanes, from);
        const __m512 high = _mm512_maskz_loadu_ps(first_lanes(n - c - kLanes), from + kLanes);
        const auto rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        _mm512_mask_storeu_epi32(to + c / 2, first_lanes(divide_up(n - c, 2)), rounded);
    }
}

// to[i] = (even[i], odd[i]), rounded to the nearest; without `odd`, zero.
static inline void pair_rows(const float* even, const float* odd, int n, GemmWord* to) {
    const __m512i interleave =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int c = 0; c < n; c += kLanes) {
        const __mmask16 lanes = first_lanes(n - c);
        const __m512 low = _mm512_maskz_loadu_ps(lanes, even + c);
        const __m512 high = odd ? _mm512_maskz_loadu_ps(lanes, odd + c) : _mm512_setzero_ps();
        const auto rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        _mm512_mask_storeu_epi32(to + c, lanes, _mm512_permutexvar_epi16(interleave, rounded));
    }
}
#else
constexpr int kWordDepth = 1;
typedef float GemmWord;
typedef vf GemmWords;

FLAME_INLINE GemmWords load_words(const GemmWord* p) { return load(p); }
FLAME_INLINE GemmWords splat_word(GemmWord word) { return splat(word); }
FLAME_INLINE vf multiply_add(GemmWords a, GemmWords b, vf acc) { return fma(a, b, acc); }
FLAME_INLINE float word_value(GemmWord word, int) { return word; }
static inline void pair_rows(const float* row, const float*, int n, GemmWord* to) {
    for (int c = 0; c < n; ++c) to[c] = row[c];
}
#endif

// Words that `depth` values take.
FLAME_INLINE int depth_words(int depth) { return divide_up(depth, kWordDepth); }

}  // namespace flame::FLAME_ISA
