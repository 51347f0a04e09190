// One tensor-core product of a warp, D = A B + D of 16 x 8 by 8 x 8 with TF32 operands and fp32
// sums: mma.sync.m16n8k8 (sm_80 on). On the host an emulation of it.
//
// Each lane holds elements of the three matrices in registers; the functions below say which, and
// the emulation finds every element through them.
//
// Tensor cores multiply exactly and add with truncation: products and sum are aligned to the
// largest of them and cut. Generations differ in how many products are added at a time and in how
// many bits they keep below fp32's 24 until the end. The emulation takes the worst of both, four at
// a time and none, so a bound that holds for it holds for each of them.
#pragma once

#include "cuda/block.h"
#include "cuda/scalar.h"
#include "float_bits.h"
#if !defined(__CUDACC__)
#include <cmath>
#endif

namespace flame::FLAME_ISA {

constexpr int kMmaRows = 16;
constexpr int kMmaColumns = 8;
constexpr int kMmaDepth = 8;

struct FragmentA {  // of (16, 8)
    float v[4];
};
struct FragmentB {  // of (8, 8)
    float v[2];
};
struct FragmentD {  // of (16, 8)
    float v[4];
};

// Where a lane's element i lies: the PTX manual's matrix fragments of mma.m16n8k8 with .tf32.
FLAME_INLINE constexpr int a_row(int lane, int i) { return lane / 4 + 8 * (i % 2); }
FLAME_INLINE constexpr int a_depth(int lane, int i) { return lane % 4 + 4 * (i / 2); }
FLAME_INLINE constexpr int b_depth(int lane, int i) { return lane % 4 + 4 * i; }
FLAME_INLINE constexpr int b_column(int lane) { return lane / 4; }
FLAME_INLINE constexpr int d_row(int lane, int i) { return lane / 4 + 8 * (i / 2); }
FLAME_INLINE constexpr int d_column(int lane, int i) { return 2 * (lane % 4) + i % 2; }

#if defined(__CUDACC__)

FLAME_INLINE void mma(PerLane<FragmentD>& d, const PerLane<FragmentA>& a,
                      const PerLane<FragmentB>& b) {
    float* sum = d.value.v;
    const float* left = a.value.v;
    const float* right = b.value.v;
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(float_to_bits(left[0])), "r"(float_to_bits(left[1])), "r"(float_to_bits(left[2])),
          "r"(float_to_bits(left[3])), "r"(float_to_bits(right[0])), "r"(float_to_bits(right[1])));
}

#else

FLAME_INLINE double power_of_two(int exponent) {
    return double_of(static_cast<uint64_t>(1023 + exponent) << 52);
}

// d + a[0] b[0] + ... + a[3] b[3] with truncation.
FLAME_INLINE float add_four(float d, const double* a, const double* b) {
    constexpr int kBits = 24;
    const double terms[5] = {static_cast<double>(d), a[0] * b[0], a[1] * b[1], a[2] * b[2],
                             a[3] * b[3]};
    double sum = 0.0;
    double largest = 0.0;
    for (const double term : terms) {
        sum += term;
        if (std::fabs(term) > largest) largest = std::fabs(term);
    }
    if (largest == 0.0 || !std::isfinite(sum)) return static_cast<float>(sum);
    const int last = static_cast<int>(bits_of(largest) >> 52) - 1023 - (kBits - 1);
    const double scale = power_of_two(-last);
    int64_t total = 0;
    for (const double term : terms) total += static_cast<int64_t>(term * scale);
    int64_t size = total < 0 ? -total : total;
    int cut = 0;
    while (size >> cut >= 1 << kBits) ++cut;
    size = size >> cut << cut;
    return static_cast<float>(static_cast<double>(total < 0 ? -size : size) * power_of_two(last));
}

static inline void mma(PerLane<FragmentD>& d, const PerLane<FragmentA>& a,
                       const PerLane<FragmentB>& b) {
    double left[kMmaRows][kMmaDepth];
    double right[kMmaColumns][kMmaDepth];
    for (int lane = 0; lane < kLanesPerWarp; ++lane) {
        for (int i = 0; i < 4; ++i) {
            left[a_row(lane, i)][a_depth(lane, i)] = static_cast<double>(a[lane].v[i]);
        }
        for (int i = 0; i < 2; ++i) {
            right[b_column(lane)][b_depth(lane, i)] = static_cast<double>(b[lane].v[i]);
        }
    }
    for (int lane = 0; lane < kLanesPerWarp; ++lane) {
        for (int i = 0; i < 4; ++i) {
            const double* x = left[d_row(lane, i)];
            const double* y = right[d_column(lane, i)];
            float& sum = d[lane].v[i];
            sum = add_four(add_four(sum, x, y), x + 4, y + 4);
        }
    }
}

#endif

// x = high + low up to 2^-23 |x|, both of TF32's 11 significant bits.
struct Tf32Pair {
    float high;
    float low;
};

// `high` is x to the nearest, ties away from zero: cvt.rna, which takes twice the instructions.
// What remains has 12 significant bits at most, so that cutting the last is as good as rounding it.
// Infinities, and finite values that round to one, give NaN, as NaN does.
FLAME_INLINE Tf32Pair split_tf32(float x) {
    constexpr uint32_t kDropped = 0x1FFF;
    const float high = bits_to_float((float_to_bits(x) + kDropped / 2 + 1) & ~kDropped);
    return {high, bits_to_float(float_to_bits(x - high) & ~kDropped)};
}

}  // namespace flame::FLAME_ISA
