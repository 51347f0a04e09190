// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC
// 2011): a counter-based generator, so that any thread computes any draw without shared state.
//
// One truth for the CPU, for every instruction set and for CUDA: bits, uniforms AND normals are
// identical everywhere. For that the float arithmetic below is only +, * and square root, each
// rounded once (contraction is off on the host, _rn intrinsics on the device).
//
// Numbering used all over the library: draw i of (seed, stream, offset) is word i % 4 of the block
// with key = seed and counter = (offset + i / 4, stream). Normals: words (0,1) and (2,3) each give
// a Box-Muller pair, so block b also holds normals 4b .. 4b+3.
#pragma once

#include <stdint.h>

#include "float_bits.h"

namespace flame {

struct PhiloxBlock {
    uint32_t v[4];
};

FLAME_HD uint32_t mul_hi(uint32_t a, uint32_t b) {
    return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

FLAME_HD PhiloxBlock philox4x32_10(PhiloxBlock counter, uint32_t key0, uint32_t key1) {
    PhiloxBlock c = counter;
    for (int round = 0; round < 10; ++round) {
        const uint32_t hi0 = mul_hi(0xD2511F53u, c.v[0]);
        const uint32_t lo0 = 0xD2511F53u * c.v[0];
        const uint32_t hi1 = mul_hi(0xCD9E8D57u, c.v[2]);
        const uint32_t lo1 = 0xCD9E8D57u * c.v[2];
        c = {{hi1 ^ c.v[1] ^ key0, lo1, hi0 ^ c.v[3] ^ key1, lo0}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return c;
}

FLAME_HD PhiloxBlock philox_block(uint64_t seed, uint64_t stream, uint64_t block) {
    const PhiloxBlock counter = {{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                                  static_cast<uint32_t>(stream),
                                  static_cast<uint32_t>(stream >> 32)}};
    return philox4x32_10(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// --- Float arithmetic that is rounded the same way everywhere

#if defined(__CUDA_ARCH__)
FLAME_HD float add_rn(float a, float b) { return __fadd_rn(a, b); }
FLAME_HD float mul_rn(float a, float b) { return __fmul_rn(a, b); }
FLAME_HD float sqrt_rn(float a) { return __fsqrt_rn(a); }
#else
FLAME_HD float add_rn(float a, float b) { return a + b; }
FLAME_HD float mul_rn(float a, float b) { return a * b; }
FLAME_HD float sqrt_rn(float a) { return __builtin_sqrtf(a); }
#endif

// Uniform in the open interval (0, 1): the upper 23 bits, centred in their cell. Exact in float32.
FLAME_HD float uniform_from_bits(uint32_t bits) {
    return mul_rn(static_cast<float>(((bits >> 9) << 1) | 1u), 5.9604644775390625e-08f);  // 2^-24
}

// Natural logarithm of a positive normal float, error below 1 ulp (Cephes logf's polynomial).
FLAME_HD float log_positive(float x) {
    uint32_t bits = float_to_bits(x);
    int exponent = static_cast<int>(bits >> 23) - 126;
    float m =
        bits_to_float((bits & 0x007FFFFFu) | 0x3F000000u);  // x = m * 2^exponent, m in [0.5, 1)
    if (m < 0.707106781186547524f) {
        m = add_rn(m, m);
        exponent -= 1;
    }
    m = add_rn(m, -1.0f);
    const float e = static_cast<float>(exponent);
    const float m2 = mul_rn(m, m);
    float p = 7.0376836292e-2f;
    p = add_rn(mul_rn(p, m), -1.1514610310e-1f);
    p = add_rn(mul_rn(p, m), 1.1676998740e-1f);
    p = add_rn(mul_rn(p, m), -1.2420140846e-1f);
    p = add_rn(mul_rn(p, m), 1.4249322787e-1f);
    p = add_rn(mul_rn(p, m), -1.6668057665e-1f);
    p = add_rn(mul_rn(p, m), 2.0000714765e-1f);
    p = add_rn(mul_rn(p, m), -2.4999993993e-1f);
    p = add_rn(mul_rn(p, m), 3.3333331174e-1f);
    float y = mul_rn(mul_rn(p, m), m2);
    y = add_rn(y, mul_rn(e, -2.12194440e-4f));
    y = add_rn(y, mul_rn(m2, -0.5f));
    return add_rn(add_rn(m, y), mul_rn(e, 0.693359375f));
}

// sin and cos of 2 pi * bits / 2^32. The range reduction is exact because it works on the bits: the
// nearest multiple of a quarter turn is taken out and the rest is at most an eighth of a turn.
FLAME_HD void sincos_turn(uint32_t bits, float* sine, float* cosine) {
    const uint32_t quadrant = (bits + 0x20000000u) >> 30;
    const int32_t rest =
        static_cast<int32_t>(bits - (quadrant << 30)) >> 8;               // 24 bits: exact in float
    const float x = mul_rn(static_cast<float>(rest), 3.7450702829e-07f);  // 2 pi / 2^24
    const float x2 = mul_rn(x, x);
    float s = -1.9515295891e-4f;
    s = add_rn(mul_rn(s, x2), 8.3321608736e-3f);
    s = add_rn(mul_rn(s, x2), -1.6666654611e-1f);
    s = add_rn(mul_rn(mul_rn(s, x2), x), x);
    float c = 2.443315711809948e-5f;
    c = add_rn(mul_rn(c, x2), -1.388731625493765e-3f);
    c = add_rn(mul_rn(c, x2), 4.166664568298827e-2f);
    c = add_rn(add_rn(mul_rn(mul_rn(c, x2), x2), mul_rn(x2, -0.5f)), 1.0f);
    const bool swap = (quadrant & 1u) != 0;
    const float first = swap ? c : s;
    const float second = swap ? s : c;
    *sine = (quadrant & 2u) != 0 ? -first : first;
    *cosine = (quadrant == 1u || quadrant == 2u) ? -second : second;
}

// Two independent N(0, 1) draws (Box and Muller 1958).
FLAME_HD void normal_pair(uint32_t bits0, uint32_t bits1, float* first, float* second) {
    const float radius = sqrt_rn(mul_rn(-2.0f, log_positive(uniform_from_bits(bits0))));
    float sine;
    float cosine;
    sincos_turn(bits1, &sine, &cosine);
    *first = mul_rn(radius, cosine);
    *second = mul_rn(radius, sine);
}

// The four normals of one block.
FLAME_HD void normal_block(uint64_t seed, uint64_t stream, uint64_t block, float out[4]) {
    const PhiloxBlock bits = philox_block(seed, stream, block);
    normal_pair(bits.v[0], bits.v[1], &out[0], &out[1]);
    normal_pair(bits.v[2], bits.v[3], &out[2], &out[3]);
}

// Normals first .. first + n - 1 of (seed, stream, offset) into out.
FLAME_HD void fill_normal(uint64_t seed, uint64_t stream, uint64_t offset, uint64_t first,
                          uint64_t n, float* out) {
    float block[4];
    for (uint64_t i = first; i < first + n;) {
        normal_block(seed, stream, offset + i / 4, block);
        do {
            out[i - first] = block[i % 4];
            ++i;
        } while (i % 4 != 0 && i < first + n);
    }
}

}  // namespace flame
