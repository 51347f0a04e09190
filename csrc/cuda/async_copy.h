// Copies from global to shared memory that go on while the thread does something else. Those of
// four floats read the second-level cache alone, where other blocks' results are.
//
// A thread's copies have arrived after await_copies, everybody's after the block's barrier behind
// it. On the host they arrive at once: what the tests there do not show is a missing await.
#pragma once

#include "cuda/block.h"
#if defined(__CUDACC__)
#include <cuda_pipeline_primitives.h>
#endif

namespace flame::FLAME_ISA {

// kFloats (1 or 4) floats; both addresses are multiples of their size.
template <int kFloats>
FLAME_INLINE void copy_async(float* to, const float* from) {
#if defined(__CUDACC__)
    __pipeline_memcpy_async(to, from, kFloats * sizeof(float));
#else
    for (int i = 0; i < kFloats; ++i) to[i] = from[i];
#endif
}

// Closes a group of copies: those since the last call.
FLAME_INLINE void commit_copies() {
#if defined(__CUDACC__)
    __pipeline_commit();
#endif
}

// Waits for all of the thread's groups but the last kLater.
template <int kLater>
FLAME_INLINE void await_copies() {
#if defined(__CUDACC__)
    __pipeline_wait_prior(kLater);
#endif
}

}  // namespace flame::FLAME_ISA
