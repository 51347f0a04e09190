// What this core can do at best, for the benchmarks: reading weights without computing anything,
// and computing without reading anything.
#include "cpu/machine_probe.h"

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

float multiply_add(int64_t rounds) {
    vf acc[kProbeChains];
    for (int c = 0; c < kProbeChains; ++c) acc[c] = splat(static_cast<float>(c));
    const vf a = splat(0.999f);
    const vf b = splat(0.001f);
    for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
        for (int c = 0; c < kProbeChains; ++c) acc[c] = fma(acc[c], a, b);
    }
    for (int c = 1; c < kProbeChains; ++c) acc[0] += acc[c];
    return sum(acc[0]);
}

}  // namespace flame::FLAME_ISA
