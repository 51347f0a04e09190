// Float storage aligned to a cache line. Large buffers ask for huge pages: a policy's weights are
// streamed once per action, and 4 KiB pages would cost a translation miss every 64 lines.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <memory>
#include <new>

#include "partition.h"

namespace flame {

class AlignedBuffer {
  public:
    AlignedBuffer() = default;

    // Zero-filled; the former content is lost.
    void resize(int64_t floats) {
        constexpr size_t kLine = 64;
        constexpr size_t kHugePage = size_t{2} << 20;
        const size_t needed = static_cast<size_t>(floats) * sizeof(float);
        // A page that is not wholly inside the request stays in small ones.
        const size_t alignment = needed >= kHugePage / 8 ? kHugePage : kLine;
        const size_t bytes = round_up(needed, alignment);
        void* p = nullptr;
        if (bytes != 0 && posix_memalign(&p, alignment, bytes) != 0) throw std::bad_alloc();
#if defined(__linux__)
        if (alignment == kHugePage) madvise(p, bytes, MADV_HUGEPAGE);
#endif
        data_.reset(static_cast<float*>(p));
        floats_ = floats;
        for (int64_t i = 0; i < floats; ++i) data_.get()[i] = 0.0f;
    }

    // At least this many floats, keeping the storage when it is large enough.
    float* at_least(int64_t floats) {
        if (floats > floats_) resize(floats);
        return data_.get();
    }

    float* data() { return data_.get(); }
    const float* data() const { return data_.get(); }

  private:
    struct Free {
        void operator()(float* p) const { free(p); }
    };
    std::unique_ptr<float, Free> data_;
    int64_t floats_ = 0;
};

}  // namespace flame
