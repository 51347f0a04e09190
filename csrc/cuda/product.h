// y = x B for a tile of rows in shared memory and a matrix B in global memory, in fp32 FFMA.
//
// Warp w owns rows w R .. w R + R - 1 (R = kRowsPerWarp) and all columns: a lane sums R x 4 outputs
// in registers, columns 4 lane .. 4 lane + 3 of 128 at a time. Slabs of 16 rows of B go through
// shared memory, double-buffered: the next slab's loads are in flight while the present one is
// multiplied, and one barrier per slab is enough.
//
// Per four rows of B a lane reads 4 vectors of B and R vectors of x (these the same for all lanes:
// a broadcast) for 16 R FFMA. Every output is one chain of FFMA over rising depth, so its bits do
// not depend on R.
#pragma once

#include "cuda/block.h"
#include "cuda/scalar.h"
#include "partition.h"

namespace flame::FLAME_ISA {

constexpr int kSlabDepth = 16;
constexpr int kSlabColumns = 4 * kLanesPerWarp;
constexpr int kSlabLd = kSlabColumns + 4;  // keeps vectors aligned and spreads a column's banks
constexpr int kSlabFloats = kSlabDepth * kSlabLd;
constexpr int kSlabPart = kSlabDepth * kSlabColumns / kThreads;

struct alignas(16) Vec4 {
    float v[4];
};

FLAME_INLINE Vec4 load4(const float* p) { return *reinterpret_cast<const Vec4*>(p); }

// B of `depth` rows and `columns` columns. kByColumn: element (k, n) is data[n ld + k], as in a
// weight (out, in) that maps in to out; otherwise data[k ld + n], the same weight used backwards.
template <bool kByColumn>
struct Operand {
    const float* data;
    int ld;
    int depth;
    int columns;
};

// Where element e of a slab lies: neighbouring threads take neighbouring addresses of `data`.
template <bool kByColumn>
FLAME_INLINE int slab_k(int e) {
    return kByColumn ? e % kSlabDepth : e / kSlabColumns;
}

template <bool kByColumn>
FLAME_INLINE int slab_n(int e) {
    return kByColumn ? e / kSlabDepth : e % kSlabColumns;
}

struct SlabPart {
    float v[kSlabPart];
};

// This thread's part of the slab at (k0, n0); outside B it is zero.
template <bool kByColumn>
FLAME_INLINE SlabPart fetch_slab(const Operand<kByColumn>& b, int k0, int n0, int thread) {
    SlabPart part;
    FLAME_UNROLL
    for (int i = 0; i < kSlabPart; ++i) {
        const int e = thread + i * kThreads;
        const int k = k0 + slab_k<kByColumn>(e);
        const int n = n0 + slab_n<kByColumn>(e);
        const int64_t at =
            kByColumn ? static_cast<int64_t>(n) * b.ld + k : static_cast<int64_t>(k) * b.ld + n;
        part.v[i] = k < b.depth && n < b.columns ? b.data[at] : 0.0f;
    }
    return part;
}

template <bool kByColumn>
FLAME_INLINE void put_slab(const SlabPart& part, int thread, float* slab) {
    FLAME_UNROLL
    for (int i = 0; i < kSlabPart; ++i) {
        const int e = thread + i * kThreads;
        slab[slab_k<kByColumn>(e) * kSlabLd + slab_n<kByColumn>(e)] = part.v[i];
    }
}

template <int kRowsPerWarp>
struct RowSums {
    float v[kRowsPerWarp][4];
};

// x points at the warp's first row and the slab's first depth.
template <int kRowsPerWarp>
FLAME_INLINE void add_slab(RowSums<kRowsPerWarp>& sums, const float* x, int ldx, const float* slab,
                           int lane) {
    FLAME_UNROLL
    for (int k = 0; k < kSlabDepth; k += 4) {
        Vec4 left[kRowsPerWarp];
        FLAME_UNROLL
        for (int r = 0; r < kRowsPerWarp; ++r) left[r] = load4(x + r * ldx + k);
        FLAME_UNROLL
        for (int kk = 0; kk < 4; ++kk) {
            const Vec4 right = load4(slab + (k + kk) * kSlabLd + 4 * lane);
            FLAME_UNROLL
            for (int r = 0; r < kRowsPerWarp; ++r) {
                FLAME_UNROLL
                for (int n = 0; n < 4; ++n) {
                    sums.v[r][n] = fmaf(left[r].v[kk], right.v[n], sums.v[r][n]);
                }
            }
        }
    }
}

// emit(row, column, sum) for every row < rows and column of the product. x (rows, ldx): shared,
// 16-byte aligned, zero from the depth to the next multiple of 16. slab: 2 kSlabFloats.
template <int kRowsPerWarp, bool kByColumn, typename Emit>
FLAME_INLINE void multiply(const Block& block, int rows, const float* x, int ldx,
                           const Operand<kByColumn>& b, float* slab, Emit&& emit) {
    const int slabs = divide_up(b.depth, kSlabDepth);
    for (int n0 = 0; n0 < b.columns; n0 += kSlabColumns) {
        PerThread<RowSums<kRowsPerWarp>> sums;
        block.each_thread([&](int thread) {
            sums[thread] = {};
            put_slab<kByColumn>(fetch_slab(b, 0, n0, thread), thread, slab);
        });
        for (int s = 0; s < slabs; ++s) {
            const float* present = slab + s % 2 * kSlabFloats;
            float* next = slab + (s + 1) % 2 * kSlabFloats;
            block.each_thread([&](int thread) {
                const int first = thread / kLanesPerWarp * kRowsPerWarp;
                SlabPart part;
                if (s + 1 < slabs) part = fetch_slab(b, (s + 1) * kSlabDepth, n0, thread);
                if (first < rows) {
                    add_slab(sums[thread], x + first * ldx + s * kSlabDepth, ldx, present,
                             thread % kLanesPerWarp);
                }
                if (s + 1 < slabs) put_slab<kByColumn>(part, thread, next);
            });
        }
        block.each_thread([&](int thread) {
            const int first = thread / kLanesPerWarp * kRowsPerWarp;
            const int column = n0 + 4 * (thread % kLanesPerWarp);
            FLAME_UNROLL
            for (int r = 0; r < kRowsPerWarp; ++r) {
                FLAME_UNROLL
                for (int n = 0; n < 4; ++n) {
                    if (first + r < rows && column + n < b.columns) {
                        emit(first + r, column + n, sums[thread].v[r][n]);
                    }
                }
            }
        });
    }
}

}  // namespace flame::FLAME_ISA
