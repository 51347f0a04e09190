// One thread block, on the device or on the host.
//
// A kernel body is a sequence of phases. A phase is a function of the thread (each_thread) or of
// the warp (each_warp) and ends at the block's barrier, so nothing that one thread writes in a
// phase may be read by another in the same phase. On the device a phase is a call and a barrier; on
// the host a loop over the threads, in rising or in falling order: a body that breaks the rule
// gives different results for the two. What a thread keeps from phase to phase, such as the sums of
// a matrix product in its registers, is a PerThread; what a lane keeps between the steps of a
// warp's phase, such as its part of a tensor core's operands (mma.h), is a PerLane.
//
// Reductions add in a fixed order (butterfly over the lanes), the same on both targets.
//
// Blocks that cooperate run a body in stages, and a stage ends at a barrier of all blocks
// (launch.h): on the host a loop over the blocks. Across it a block keeps its shared memory and
// nothing else.
#pragma once

#include <stdint.h>

#include "cuda/target.h"

namespace flame::FLAME_ISA {

constexpr int kThreads = 256;
constexpr int kLanesPerWarp = 32;
constexpr int kWarps = kThreads / kLanesPerWarp;

// A few sums that are formed side by side.
template <int kCount>
struct Sums {
    float v[kCount];

    FLAME_BODY float at(int i) const {
        float found = v[0];
        FLAME_UNROLL
        for (int j = 1; j < kCount; ++j) found = i == j ? v[j] : found;
        return found;
    }
};

#if defined(__CUDACC__)

template <typename T>
struct PerThread {
    T value;
    FLAME_BODY T& operator[](int) { return value; }
};

template <typename T>
struct PerLane {
    T value;
    FLAME_BODY T& operator[](int) { return value; }
    FLAME_BODY const T& operator[](int) const { return value; }
};

struct Warp {
    int index;

    // body(lane) for every lane, without a barrier: for what a lane keeps to itself.
    template <typename Body>
    FLAME_BODY void each_lane(Body&& body) const {
        body(lane());
    }

    // body(c) for every c < n, then the warp's barrier.
    template <typename Body>
    FLAME_BODY void each(int n, Body&& body) const {
        for (int c = lane(); c < n; c += kLanesPerWarp) body(c);
        meet();
    }

    // The barrier alone: where lanes have read, by `sum`, what others write next.
    FLAME_BODY void meet() const { __syncwarp(); }

    // term(0) + ... + term(n - 1), the same bits in every lane.
    template <typename T = float, typename Term>
    FLAME_BODY T sum(int n, Term&& term) const {
        T total = 0;
        for (int c = lane(); c < n; c += kLanesPerWarp) total += term(c);
        for (int mask = kLanesPerWarp / 2; mask > 0; mask /= 2) {
            total += __shfl_xor_sync(0xFFFFFFFFu, total, mask);
        }
        return total;
    }

    // sum() of term(c, i) for each i < kCount.
    template <int kCount, typename Term>
    FLAME_BODY Sums<kCount> sums(int n, Term&& term) const {
        Sums<kCount> total{};
        for (int c = lane(); c < n; c += kLanesPerWarp) {
            FLAME_UNROLL
            for (int i = 0; i < kCount; ++i) total.v[i] += term(c, i);
        }
        for (int mask = kLanesPerWarp / 2; mask > 0; mask /= 2) {
            FLAME_UNROLL
            for (int i = 0; i < kCount; ++i) {
                total.v[i] += __shfl_xor_sync(0xFFFFFFFFu, total.v[i], mask);
            }
        }
        return total;
    }

    // The largest of `low` and the terms, in every lane; NaN terms do not count.
    template <typename T, typename Term>
    FLAME_BODY T largest(int n, T low, Term&& term) const {
        for (int c = lane(); c < n; c += kLanesPerWarp) low = larger(low, term(c));
        for (int mask = kLanesPerWarp / 2; mask > 0; mask /= 2) {
            low = larger(low, __shfl_xor_sync(0xFFFFFFFFu, low, mask));
        }
        return low;
    }

  private:
    static FLAME_BODY int lane() { return static_cast<int>(threadIdx.x) % kLanesPerWarp; }
    template <typename T>
    static FLAME_BODY T larger(T a, T b) {
        return b > a ? b : a;
    }
};

struct Block {
    int64_t index;
    float* shared;  // 16-byte aligned

    template <typename Body>
    FLAME_BODY void each_thread(Body&& body) const {
        body(static_cast<int>(threadIdx.x));
        __syncthreads();
    }

    template <typename Body>
    FLAME_BODY void each_warp(Body&& body) const {
        body(Warp{static_cast<int>(threadIdx.x) / kLanesPerWarp});
        __syncthreads();
    }
};

#else

template <typename T>
struct PerThread {
    T values[kThreads];
    T& operator[](int thread) { return values[thread]; }
};

template <typename T>
struct PerLane {
    T values[kLanesPerWarp];
    T& operator[](int lane) { return values[lane]; }
    const T& operator[](int lane) const { return values[lane]; }
};

struct Warp {
    int index;
    bool falling;

    template <typename Body>
    void each_lane(Body&& body) const {
        for (int l = 0; l < kLanesPerWarp; ++l) body(falling ? kLanesPerWarp - 1 - l : l);
    }

    template <typename Body>
    void each(int n, Body&& body) const {
        for (int c = 0; c < n; ++c) body(falling ? n - 1 - c : c);
    }

    void meet() const {}

    template <typename T = float, typename Term>
    T sum(int n, Term&& term) const {
        T lanes[kLanesPerWarp] = {};
        for (int c = 0; c < n; ++c) lanes[c % kLanesPerWarp] += term(c);
        for (int mask = kLanesPerWarp / 2; mask > 0; mask /= 2) {
            T other[kLanesPerWarp];
            for (int l = 0; l < kLanesPerWarp; ++l) other[l] = lanes[l ^ mask];
            for (int l = 0; l < kLanesPerWarp; ++l) lanes[l] += other[l];
        }
        return lanes[0];
    }

    template <int kCount, typename Term>
    Sums<kCount> sums(int n, Term&& term) const {
        Sums<kCount> total{};
        for (int i = 0; i < kCount; ++i) {
            total.v[i] = sum(n, [&](int c) { return term(c, i); });
        }
        return total;
    }

    template <typename T, typename Term>
    T largest(int n, T low, Term&& term) const {
        for (int c = 0; c < n; ++c) {
            const T value = term(c);
            if (value > low) low = value;
        }
        return low;
    }
};

struct Block {
    int64_t index;
    float* shared;  // 16-byte aligned
    bool falling;

    template <typename Body>
    void each_thread(Body&& body) const {
        for (int t = 0; t < kThreads; ++t) body(falling ? kThreads - 1 - t : t);
    }

    template <typename Body>
    void each_warp(Body&& body) const {
        for (int w = 0; w < kWarps; ++w) body(Warp{falling ? kWarps - 1 - w : w, falling});
    }
};

#endif

// The first index of the largest of n terms; NaN wins only where there is nothing else.
template <typename T, typename Term>
FLAME_INLINE int first_largest(const Warp& warp, int n, T low, Term&& term) {
    const T best = warp.largest(n, low, term);
    const int from_end = warp.largest(n, 0, [&](int k) { return term(k) == best ? n - k : 0; });
    return from_end > 0 ? n - from_end : 0;
}

}  // namespace flame::FLAME_ISA
