// How many rows the block of rows that begins at `first` has.
#pragma once

#include "lanes.h"

namespace flame::FLAME_ISA {

// At most `limit` of the rows first .. total - 1.
FLAME_INLINE int row_count(int64_t first, int64_t total, int limit) {
    const int64_t left = total - first;
    return left < limit ? static_cast<int>(left) : limit;
}

}  // namespace flame::FLAME_ISA
