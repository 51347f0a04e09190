// A small persistent thread pool: the extension uses no OpenMP, so that it never meets a second
// OpenMP runtime in the process.
//
// parallel_for cuts [0, n) into several chunks per thread and runs body(begin, end) on each;
// threads, the caller among them, take those of their own share first, then any that are left.
// Results must not depend on the cut: write only what belongs to the items of the chunk. A nested
// call, a call while another thread uses the pool simply run inline; a forked child starts threads
// of its own. An exception in a chunk is rethrown in the caller after all chunks have ended.
#pragma once

#include <cstdint>
#include <type_traits>

namespace flame {

// Threads that parallel_for may use, the caller included.
int num_threads();
// n >= 1; takes effect with the next parallel_for.
void set_num_threads(int n);

using ChunkFn = void (*)(void* context, int64_t begin, int64_t end);
// Chunks hold at least `grain` items each (grain >= 1), so small jobs stay on the calling thread.
void parallel_for_raw(int64_t n, int64_t grain, ChunkFn fn, void* context);

template <typename Body>
void parallel_for(int64_t n, int64_t grain, Body&& body) {
    parallel_for_raw(
        n, grain,
        [](void* context, int64_t begin, int64_t end) {
            (*static_cast<std::remove_reference_t<Body>*>(context))(begin, end);
        },
        const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace flame
