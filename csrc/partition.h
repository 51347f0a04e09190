// Cutting n things into parts: the integer arithmetic of tiles, chunks, panels and paddings, for
// host and device code alike. Internal linkage, so that no instruction set's copy serves another.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define FLAME_ANYWHERE __host__ __device__
#else
#define FLAME_ANYWHERE
#endif

namespace flame {

// Parts of at most d things that n need; n >= 0, d > 0.
template <typename N, typename D>
static constexpr FLAME_ANYWHERE auto divide_up(N n, D d) {
    return (n + d - 1) / d;
}

// The smallest multiple of d that is at least n.
template <typename N, typename D>
static constexpr FLAME_ANYWHERE auto round_up(N n, D d) {
    return divide_up(n, d) * d;
}

// Rows of the part that begins at `first`: at most `limit` of first .. total - 1.
static inline constexpr FLAME_ANYWHERE int row_count(int64_t first, int64_t total, int limit) {
    const int64_t left = total - first;
    return left < limit ? static_cast<int>(left) : limit;
}

}  // namespace flame
