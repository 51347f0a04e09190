// Cutting rows into chunks of nearly equal size at whole register tiles: a part of a tile costs
// almost as much as a whole one, and a short last chunk would read all weights for a few rows.
#pragma once

#include "cpu/gemm.h"
#include "partition.h"
#include "thread_pool.h"

namespace flame::FLAME_ISA {

struct RowRange {
    int64_t first;
    int rows;
};

struct RowCut {
    int64_t rows;
    int64_t chunks;

    RowRange operator[](int64_t chunk) const {
        const int64_t first = begin(chunk);
        return {first, row_count(first, rows, static_cast<int>(begin(chunk + 1) - first))};
    }

    // Rows of the largest chunk, in whole tiles.
    int most() const {
        const int64_t tiles = divide_up(rows, kGemmRows);
        return chunks > 0 ? static_cast<int>(divide_up(tiles, chunks)) * kGemmRows : 0;
    }

  private:
    int64_t begin(int64_t chunk) const {
        return chunk * divide_up(rows, kGemmRows) / chunks * kGemmRows;
    }
};

// The fewest chunks of at most `limit` rows; every limit is at least one register tile.
FLAME_INLINE int64_t fewest_chunks(int64_t rows, int limit) {
    return divide_up(divide_up(rows, kGemmRows), limit / kGemmRows);
}

// As few chunks as `limit` rows allow, but an even number, so that two threads have the same to do.
// For kernels with sums over rows, which must not depend on the number of threads.
static inline RowCut even_cut(int64_t rows, int limit) {
    const int64_t fewest = fewest_chunks(rows, limit);
    return {rows, fewest > 1 ? round_up(fewest, 2) : fewest};
}

// Below this a chunk reads more weights than it multiplies.
constexpr int kMinChunkRows = 16;

// As many chunks for every thread. For kernels whose bits do not depend on the cut.
static inline RowCut balanced_cut(int64_t rows, int limit) {
    const int64_t fewest = fewest_chunks(rows, limit);
    const int64_t balanced = round_up(fewest, static_cast<int64_t>(num_threads()));
    const int64_t most = rows / kMinChunkRows;
    const int64_t wanted = balanced < most ? balanced : most;
    return {rows, wanted > fewest ? wanted : fewest};
}

}  // namespace flame::FLAME_ISA
