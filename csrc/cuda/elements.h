// body(i) for every i < count: what needs no shared memory and no neighbour.
#pragma once

#include "cuda/launch.h"
#include "partition.h"

namespace flame::FLAME_ISA {

constexpr int kElementsPerThread = 4;
constexpr int64_t kElementsPerBlock = kThreads * kElementsPerThread;

// body(i) for the block's elements.
template <typename Body>
FLAME_INLINE void each_element(const Block& block, int64_t count, Body&& body) {
    block.each_thread([&](int t) {
        const int64_t first = block.index * kElementsPerBlock + t;
        for (int e = 0; e < kElementsPerThread; ++e) {
            const int64_t i = first + e * kThreads;
            if (i < count) body(i);
        }
    });
}

static inline int64_t element_blocks(int64_t count) { return divide_up(count, kElementsPerBlock); }

// A struct whose operator()(i) is the body.
template <typename Each>
struct ElementsKernel {
    static constexpr const char* kName = Each::kName;
    Each each;
    int64_t count;

    FLAME_BODY void operator()(const Block& block) const {
        each_element(block, count, [&](int64_t i) { each(i); });
    }
};

template <typename Each>
static inline void for_elements(const Launcher& launch, int64_t count, const Each& each) {
    launch(ElementsKernel<Each>{each, count}, element_blocks(count), 0);
}

}  // namespace flame::FLAME_ISA
