// What this core can do at best, for the benchmarks: reading weights without computing anything.
#include "cpu/policy_act_kernel.h"
#include "cpu/simd.h"

namespace flame::FLAME_ISA {

float read_stream(const float* data, int64_t floats) {
    constexpr int kStreams = 8;
    vf acc[kStreams] = {};
    int64_t i = 0;
    for (; i + kStreams * kLanes <= floats; i += kStreams * kLanes) {
        for (int s = 0; s < kStreams; ++s) acc[s] += load(data + i + s * kLanes);
    }
    for (int s = 1; s < kStreams; ++s) acc[0] += acc[s];
    return sum(acc[0]);
}

}  // namespace flame::FLAME_ISA
