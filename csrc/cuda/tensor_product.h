// y = x B for a tile of rows in shared memory and a matrix B in global memory, on tensor cores with
// the accuracy of fp32: "3xTF32". Operands are split into two TF32 values, x = high + low, and
//     x b = low b_high + high b_low + high b_high
// leaves out low b_low, 2^-22 of x b. Tensor cores truncate their sums, so that only the three
// products of 8 depths are added there, the small ones first, and the rest in fp32 as usual.
//
// Largest error of a 64 x 64 product in emulation, over that of PyTorch's float32 (depth 16, 64,
// 256): 1.6, 0.6, 0.6 with normal factors, 1.2, 0.5, 0.8 with positive ones, where truncation errs
// to one side. Sums of 16 depths: up to 2.6, of all: 15, a single TF32: 270 and more. The six
// largest products of three bf16 terms err less (0.3 to 0.8) and take as long in the tensor cores,
// but twice the operations of splitting.
//
// Warp w owns all rows and the columns 8 (w + 8 i) .. + 7 of 256 (64, 128 in narrower layers) at a
// time. B goes from global memory straight to the registers of the one warp that needs it, a step
// of 16 depths ahead: no shared memory, and no barrier before the product's end. Within a step a
// lane's depths are 4 q .. 4 q + 3 (q = lane % 4), one vector of x and one of B: a sum does not
// mind the order in which fragments name its depths. Every output is one chain over rising depth,
// so its bits do not depend on the tile.
//
// Floor, for 64 rows and 256 columns, per warp and step: 96 mma of 4 cycles at the full rate of an
// H100 (494 TFLOP/s), about 6.5 at what mma.sync reaches of it (62 %), two warps per scheduler: 768
// or 1240 cycles. Issued beside them 190 operations of splitting, 128 additions, 50 of loads and
// addresses: 460 a warp, 920 of those cycles. Shared memory is read for 32 cycles a warp, B through
// L1 likewise: 512. So tensor cores bound it, at 165 or 102 TFLOP/s of fp32 products, against 67 of
// FFMA. Sums are stored one by one, with four-way bank conflicts: 2000 cycles a layer beside 16
// steps. 64 rows take all 255 registers; a few values spill outside of the loop over steps.
//
// TF32 runs at 8 times the rate of FFMA on compute capability 8.0 (156 to 19.5 TFLOP/s) and 7.4
// times on 9.0, but at 1 to 2 times on 8.6, 8.9 and 12.0, where a third of it is slower than FFMA.
#pragma once

#include "cuda/mma.h"
#include "cuda/product.h"

namespace flame::FLAME_ISA {

constexpr int kStepDepth = 2 * kMmaDepth;

// Floats from row to row of x for which the vectors of two rows lie in different banks.
static inline int tensor_ld(int columns) {
    constexpr int kBanks = 32;
    return columns % kBanks == 0 ? columns + kBanks / 2 : columns;
}

// One warp's columns: those of tile i begin at n0 + 64 i.
template <int kRowTiles, int kColumnTiles>
struct TensorPass {
    using Columns = PerLane<Vec4>[kColumnTiles];

    const Warp& warp;
    const float* x;
    int ldx;
    const Operand<true>& b;
    int n0;
    bool vectors;
    PerLane<FragmentD> sums[kRowTiles][kColumnTiles];  // begin as zero

    FLAME_BODY int column(int tile) const { return n0 + kWarps * kMmaColumns * tile; }

    // A lane's depths k0 + 4 q .. k0 + 4 q + 3 of its columns; outside B they are zero.
    FLAME_BODY void fetch(int k0, Columns& to) const {
        const bool inside =
            column(kColumnTiles - 1) + kMmaColumns <= b.columns && k0 + kStepDepth <= b.depth;
        warp.each_lane([&](int lane) {
            const int k = k0 + 4 * (lane % 4);
            const int first = column(0) + b_column(lane);
            const float* from = b.data + static_cast<int64_t>(first) * b.ld + k;
            if (inside && vectors) {
                FLAME_UNROLL
                for (int i = 0; i < kColumnTiles; ++i) {
                    to[i][lane] = load4(from + static_cast<int64_t>(column(i) - n0) * b.ld);
                }
                return;
            }
            FLAME_UNROLL
            for (int i = 0; i < kColumnTiles; ++i) {
                FLAME_UNROLL
                for (int d = 0; d < 4; ++d) {
                    const bool exists = first + column(i) - n0 < b.columns && k + d < b.depth;
                    const int64_t at = static_cast<int64_t>(column(i) - n0) * b.ld + d;
                    to[i][lane].v[d] = exists ? from[at] : 0.0f;
                }
            }
        });
    }

    // Adds depths k0 .. k0 + 15 and leaves the next step's of B in `columns`.
    FLAME_BODY void step(int k0, Columns& columns) {
        PerLane<FragmentB> high[2][kColumnTiles];
        PerLane<FragmentB> low[2][kColumnTiles];
        warp.each_lane([&](int lane) {
            FLAME_UNROLL
            for (int j = 0; j < 2; ++j) {
                FLAME_UNROLL
                for (int i = 0; i < kColumnTiles; ++i) {
                    split(columns[i][lane].v + 2 * j, high[j][i][lane].v, low[j][i][lane].v, 1);
                }
            }
        });
        fetch(k0 + kStepDepth, columns);
        FLAME_UNROLL
        for (int r = 0; r < kRowTiles; ++r) {
            PerLane<Vec4> rows[2];
            warp.each_lane([&](int lane) {
                FLAME_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const int row = kMmaRows * r + a_row(lane, half);
                    rows[half][lane] = load4(x + row * ldx + k0 + 4 * (lane % 4));
                }
            });
            FLAME_UNROLL
            for (int j = 0; j < 2; ++j) add_products(sums[r], j, rows, high[j], low[j]);
        }
    }

    // Two of a lane's depths, `stride` elements of its fragments apart.
    static FLAME_BODY void split(const float* from, float* high, float* low, int stride) {
        FLAME_UNROLL
        for (int d = 0; d < 2; ++d) {
            const Tf32Pair pair = split_tf32(from[d]);
            high[stride * d] = pair.high;
            low[stride * d] = pair.low;
        }
    }

    // Half j of the step for the sums of one row tile.
    FLAME_BODY void add_products(PerLane<FragmentD> (&to)[kColumnTiles], int j,
                                 const PerLane<Vec4> (&rows)[2],
                                 const PerLane<FragmentB> (&b_high)[kColumnTiles],
                                 const PerLane<FragmentB> (&b_low)[kColumnTiles]) {
        PerLane<FragmentA> high;
        PerLane<FragmentA> low;
        PerLane<FragmentD> part[kColumnTiles];
        warp.each_lane([&](int lane) {
            FLAME_UNROLL
            for (int half = 0; half < 2; ++half) {
                split(rows[half][lane].v + 2 * j, high[lane].v + half, low[lane].v + half, 2);
            }
            FLAME_UNROLL
            for (int i = 0; i < kColumnTiles; ++i) part[i][lane] = {};
        });
        FLAME_UNROLL
        for (int i = 0; i < kColumnTiles; ++i) mma(part[i], low, b_high[i]);
        FLAME_UNROLL
        for (int i = 0; i < kColumnTiles; ++i) mma(part[i], high, b_low[i]);
        FLAME_UNROLL
        for (int i = 0; i < kColumnTiles; ++i) mma(part[i], high, b_high[i]);
        warp.each_lane([&](int lane) {
            FLAME_UNROLL
            for (int i = 0; i < kColumnTiles; ++i) {
                FLAME_UNROLL
                for (int e = 0; e < 4; ++e) to[i][lane].v[e] += part[i][lane].v[e];
            }
        });
    }

    FLAME_BODY void run() {
        Columns columns;
        fetch(0, columns);
        for (int k0 = 0; k0 < b.depth; k0 += kStepDepth) step(k0, columns);
    }

    template <typename Emit>
    FLAME_BODY void give(int rows, Emit&& emit) const {
        warp.each_lane([&](int lane) {
            FLAME_UNROLL
            for (int r = 0; r < kRowTiles; ++r) {
                FLAME_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const int row = kMmaRows * r + d_row(lane, 2 * half);
                    if (row < rows) give_row(lane, row, sums[r], 2 * half, emit);
                }
            }
        });
    }

    template <typename Emit>
    FLAME_BODY void give_row(int lane, int row, const PerLane<FragmentD> (&from)[kColumnTiles],
                             int first, Emit&& emit) const {
        FLAME_UNROLL
        for (int i = 0; i < kColumnTiles; ++i) {
            FLAME_UNROLL
            for (int e = first; e < first + 2; ++e) {
                const int n = column(i) + d_column(lane, e);
                if (n < b.columns) emit(row, n, from[i][lane].v[e]);
            }
        }
    }
};

// emit(row, column, sum) for every row < rows and column of the product. x (16 kRowTiles, ldx):
// shared, 16-byte aligned, zero from the depth to the next multiple of 16 in the first `rows` rows;
// whatever the others hold stays in them. ldx: tensor_ld.
template <int kRowTiles, typename Emit>
FLAME_INLINE void tensor_multiply(const Block& block, int rows, const float* x, int ldx,
                                  const Operand<true>& b, Emit&& emit) {
    constexpr int kColumnsPerTile = kWarps * kMmaColumns;
    const bool vectors = b.ld % 4 == 0 && reinterpret_cast<uintptr_t>(b.data) % sizeof(Vec4) == 0;
    block.each_warp([&](const Warp& warp) {
        const auto pass = [&](auto column_tiles, int first) {
            constexpr int kColumnTiles = decltype(column_tiles)::value;
            TensorPass<kRowTiles, kColumnTiles> columns{
                warp, x, ldx, b, first + kMmaColumns * warp.index, vectors, {}};
            columns.run();
            columns.give(rows, emit);
        };
        for (int first = 0; first < b.columns; first += 4 * kColumnsPerTile) {
            const int left = b.columns - first;
            if (left > 2 * kColumnsPerTile) {
                pass(std::integral_constant<int, 4>{}, first);
            } else if (left > kColumnsPerTile) {
                pass(std::integral_constant<int, 2>{}, first);
            } else {
                pass(std::integral_constant<int, 1>{}, first);
            }
        }
    });
}

}  // namespace flame::FLAME_ISA
