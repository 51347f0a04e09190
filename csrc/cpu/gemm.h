// Matrix products on row tiles, the inner loop of every training kernel.
//
// C (rows x n) = init + A (rows x k) B (k x n), accumulated in registers in ascending k, so an
// element's bits do not depend on how rows are cut into tiles or spread over threads.
//
// The microkernel holds kGemmRows x kGemmCols accumulators in registers (6 x 16 floats with AVX2:
// 12 accumulators, 2 vectors of B, 1 broadcast of A out of 16 registers; per k it issues 12 FMAs
// and 8 loads, so two FMAs per cycle are sustained from L1). A is read by broadcasts, straight from
// row-major storage; B is either packed into panels of kGemmCols columns or read in place. Both are
// made of words (gemm_word.h): of bfloat16 pairs, A is rounded block by block as it is read.
#pragma once

#include <cstddef>

#include "cpu/gemm_word.h"
#include "partition.h"

namespace flame::FLAME_ISA {

constexpr int kGemmCols = 2 * kLanes;
#if defined(FLAME_ISA_AVX512)
constexpr int kGemmRows = 12;
#else
constexpr int kGemmRows = 6;
#endif

// Leading dimension of activation rows: whole panels plus one cache line, which keeps rows of
// 2^n floats from competing for the same L1 sets.
static inline int padded_columns(int n) { return (n + 31) / 32 * 32 + 16; }

static inline int panel_count(int n) { return divide_up(n, kGemmCols); }

// Words of a packed matrix with n columns and depth k.
static inline size_t packed_size(int n, int k) {
    return static_cast<size_t>(panel_count(n)) * kGemmCols * depth_words(k);
}

// Where an operand's word (row i, depth k in words) lives: data[i * row_stride + k * depth_stride].
struct GemmA {
    const GemmWord* data;
    ptrdiff_t row_stride;
    ptrdiff_t depth_stride;
};

// One register tile, `depth` in words. `init` are per-row pointers to the starting values, null for
// zeros; they may be the rows of C themselves (accumulation). With kAdd the tile is added to C when
// it is complete: the products of one tile are summed by themselves.
template <int kRows, bool kAdd = false>
static inline void gemm_micro(int depth, const GemmA& a, const GemmWord* b, ptrdiff_t ldb,
                              const float* const* init, ptrdiff_t column, float* c, ptrdiff_t ldc) {
    vf acc[kRows][2];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
        acc[i][0] = init ? load(init[i] + column) : zero();
        acc[i][1] = init ? load(init[i] + column + kLanes) : zero();
    }
    const GemmWord* ak = a.data;
    const ptrdiff_t stride = a.row_stride;
    for (int k = 0; k < depth; ++k, ak += a.depth_stride, b += ldb) {
        const GemmWords b0 = load_words(b);
        const GemmWords b1 = load_words(b + kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
            const GemmWords x = splat_word(ak[i * stride]);
            acc[i][0] = multiply_add(x, b0, acc[i][0]);
            acc[i][1] = multiply_add(x, b1, acc[i][1]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
        float* to = c + i * ldc;
        store(to, kAdd ? load(to) + acc[i][0] : acc[i][0]);
        store(to + kLanes, kAdd ? load(to + kLanes) + acc[i][1] : acc[i][1]);
    }
}

// The last, partial row block: picks the instantiation with exactly `rows` rows.
template <int kRows, bool kAdd = false>
static inline void gemm_micro_rows(int rows, int depth, const GemmA& a, const GemmWord* b,
                                   ptrdiff_t ldb, const float* const* init, ptrdiff_t column,
                                   float* c, ptrdiff_t ldc) {
    if (rows == kRows) {
        gemm_micro<kRows, kAdd>(depth, a, b, ldb, init, column, c, ldc);
    } else if constexpr (kRows > 1) {
        gemm_micro_rows<kRows - 1, kAdd>(rows, depth, a, b, ldb, init, column, c, ldc);
    }
}

// C (rows x n, written in whole panels: ldc >= panel_count(n) * kGemmCols).
// `b` panel p starts at b + p * panel_stride, its words of one depth kGemmCols after another.
// `init` holds `rows` pointers to at least as many columns as C has, or is null.
static inline void gemm(int rows, int n, int depth, GemmA a, const GemmWord* b,
                        ptrdiff_t panel_stride, const float* const* init, float* c, ptrdiff_t ldc) {
    const int panels = panel_count(n);
    for (int p = 0; p < panels; ++p) {
        const ptrdiff_t column = static_cast<ptrdiff_t>(p) * kGemmCols;
        const GemmWord* panel = b + p * panel_stride;
        for (int i = 0; i < rows; i += kGemmRows) {
            const GemmA block{a.data + i * a.row_stride, a.row_stride, a.depth_stride};
            const float* const* start = init ? init + i : nullptr;
            const int left = rows - i < kGemmRows ? rows - i : kGemmRows;
            gemm_micro_rows<kGemmRows>(left, depth, block, panel, kGemmCols, start, column,
                                       c + i * ldc + column, ldc);
        }
    }
}

// The same with B packed by pack_transposed or pack_plain; `first` and `depth` select a range of
// B's `packed_depth` rows (an MLP's first layer multiplies its input blocks separately).
#if defined(FLAME_ISA_AVX512_BF16)
constexpr int kRoundedRows = 4 * kGemmRows;
constexpr int kRoundedWords = 256;

static inline void gemm_packed(int rows, int n, int first, int depth, int packed_depth,
                               const float* a, ptrdiff_t lda, const GemmWord* packed,
                               const float* const* init, float* c, ptrdiff_t ldc) {
    GemmWord rounded[kRoundedRows * kRoundedWords];
    const float* sums[kRoundedRows];
    const ptrdiff_t panel_stride = static_cast<ptrdiff_t>(depth_words(packed_depth)) * kGemmCols;
    // The range may begin with the second value of a word; the first one is then multiplied by 0.
    const int skipped = first % kWordDepth;
    const int end = skipped + depth;
    for (int i = 0; i < rows; i += kRoundedRows) {
        const int block = row_count(i, rows, kRoundedRows);
        for (int r = 0; r < block; ++r) sums[r] = c + (i + r) * ldc;
        const float* const* start = init ? init + i : nullptr;
        int k = 0;
        do {  // at least once: without depth C is what it starts from
            const int left = row_count(k, end, kRoundedWords * kWordDepth);
            for (int r = 0; r < block; ++r) {
                round_range(a + (i + r) * lda, k - skipped, left, rounded + r * kRoundedWords);
            }
            gemm(block, n, depth_words(left), GemmA{rounded, kRoundedWords, 1},
                 packed + static_cast<ptrdiff_t>((first - skipped + k) / kWordDepth) * kGemmCols,
                 panel_stride, k == 0 ? start : sums, c + i * ldc, ldc);
            k += kRoundedWords * kWordDepth;
        } while (k < end);
    }
}
#else
static inline void gemm_packed(int rows, int n, int first, int depth, int packed_depth,
                               const float* a, ptrdiff_t lda, const GemmWord* packed,
                               const float* const* init, float* c, ptrdiff_t ldc) {
    gemm(rows, n, depth, GemmA{a, lda, 1}, packed + static_cast<ptrdiff_t>(first) * kGemmCols,
         static_cast<ptrdiff_t>(packed_depth) * kGemmCols, init, c, ldc);
}
#endif

// Element (depth k, column) of a packed matrix.
FLAME_INLINE float packed_value(const GemmWord* packed, int packed_depth, int k, int column) {
    const ptrdiff_t panel = static_cast<ptrdiff_t>(depth_words(packed_depth)) * kGemmCols;
    const GemmWord word =
        packed[column / kGemmCols * panel + static_cast<ptrdiff_t>(k / kWordDepth) * kGemmCols +
               column % kGemmCols];
    return word_value(word, k);
}

// to[k * kGemmCols + j] = from[j * ld + k] for the square block that one register transpose holds.
#if defined(FLAME_ISA_AVX2) || defined(FLAME_ISA_AVX512)
constexpr int kTransposed = 8;

FLAME_INLINE void transpose_block(const GemmWord* from, ptrdiff_t ld, GemmWord* to) {
    __m256 pairs[8];
    for (int j = 0; j < 8; j += 2) {
        const __m256 even = _mm256_loadu_ps(reinterpret_cast<const float*>(from + j * ld));
        const __m256 odd = _mm256_loadu_ps(reinterpret_cast<const float*>(from + (j + 1) * ld));
        pairs[j] = _mm256_unpacklo_ps(even, odd);
        pairs[j + 1] = _mm256_unpackhi_ps(even, odd);
    }
    __m256 fours[8];  // [h * 4 + k]: rows 4 h to 4 h + 3 of columns k and, in the upper lane, k + 4
    for (int h = 0; h < 2; ++h) {
        const __m256* pair = pairs + 4 * h;
        fours[h * 4] = _mm256_shuffle_ps(pair[0], pair[2], 0x44);
        fours[h * 4 + 1] = _mm256_shuffle_ps(pair[0], pair[2], 0xEE);
        fours[h * 4 + 2] = _mm256_shuffle_ps(pair[1], pair[3], 0x44);
        fours[h * 4 + 3] = _mm256_shuffle_ps(pair[1], pair[3], 0xEE);
    }
    for (int k = 0; k < 4; ++k) {
        const __m256 low = _mm256_permute2f128_ps(fours[k], fours[4 + k], 0x20);
        const __m256 high = _mm256_permute2f128_ps(fours[k], fours[4 + k], 0x31);
        _mm256_storeu_ps(reinterpret_cast<float*>(to + k * kGemmCols), low);
        _mm256_storeu_ps(reinterpret_cast<float*>(to + (k + 4) * kGemmCols), high);
    }
}
#else
constexpr int kTransposed = 4;

FLAME_INLINE void transpose_block(const GemmWord* from, ptrdiff_t ld, GemmWord* to) {
    for (int k = 0; k < 4; ++k) {
        for (int j = 0; j < 4; ++j) to[k * kGemmCols + j] = from[j * ld + k];
    }
}
#endif

// packed[k * kGemmCols + j] = rows[j * ld + k] for one panel of `valid` rows, the others zero.
static inline void transpose_panel(const GemmWord* rows, ptrdiff_t ld, int valid, int depth,
                                   GemmWord* packed) {
    const int whole = valid == kGemmCols ? depth / kTransposed * kTransposed : 0;
    for (int k = 0; k < whole; k += kTransposed) {
        for (int j = 0; j < kGemmCols; j += kTransposed) {
            transpose_block(rows + j * ld + k, ld, packed + k * kGemmCols + j);
        }
    }
    for (int k = whole; k < depth; ++k) {
        GemmWord* to = packed + k * kGemmCols;
        for (int j = 0; j < valid; ++j) to[j] = rows[j * ld + k];
        for (int j = valid; j < kGemmCols; ++j) to[j] = 0;
    }
}

// Packs W (out x in, row-major) as B = W^T: panels of kGemmCols outputs, depth `in`, zero padded.
static inline void pack_transposed(const float* w, int out, int in, GemmWord* packed) {
    for (int first = 0; first < out; first += kGemmCols) {
        const int valid = out - first < kGemmCols ? out - first : kGemmCols;
        const float* rows = w + static_cast<ptrdiff_t>(first) * in;
#if defined(FLAME_ISA_AVX512_BF16)
        constexpr int kWords = 128;
        GemmWord rounded[kGemmCols * kWords];
        for (int k = 0; k < in; k += kWords * kWordDepth) {
            const int left = row_count(k, in, kWords * kWordDepth);
            for (int j = 0; j < valid; ++j) {
                round_range(rows + static_cast<ptrdiff_t>(j) * in, k, left, rounded + j * kWords);
            }
            transpose_panel(rounded, kWords, valid, depth_words(left), packed);
            packed += static_cast<ptrdiff_t>(depth_words(left)) * kGemmCols;
        }
#else
        transpose_panel(rows, in, valid, in, packed);
        packed += static_cast<ptrdiff_t>(in) * kGemmCols;
#endif
    }
}

// Packs the first `columns` columns of W (out x in) as B = W: panels of kGemmCols inputs, depth
// `out`, zero padded. Used to carry gradients back through a layer.
static inline void pack_plain(const float* w, int out, int in, int columns, GemmWord* packed) {
    for (int p = 0; p < panel_count(columns); ++p) {
        const int first = p * kGemmCols;
        const int valid = columns - first < kGemmCols ? columns - first : kGemmCols;
        for (int o = 0; o < out; o += kWordDepth) {
            const float* row = w + static_cast<ptrdiff_t>(o) * in + first;
            pair_rows(row, o + 1 < out ? row + in : nullptr, valid, packed);
            for (int j = valid; j < kGemmCols; ++j) packed[j] = 0;
            packed += kGemmCols;
        }
    }
}

}  // namespace flame::FLAME_ISA
