#pragma once

#include <stdint.h>

namespace flame {

// Independent sums of multiply_add: more than latency times units of any core that we know.
constexpr int kProbeChains = 12;

#if defined(FLAME_ISA)
namespace FLAME_ISA {

// Sum of `floats` floats but for those beyond the last multiple of 128, read once in order: the
// floor of a memory-bound kernel.
float read_stream(const float* data, int64_t floats);

// rounds * kProbeChains vector multiply-adds in registers: the floor of a compute-bound kernel.
float multiply_add(int64_t rounds);

}  // namespace FLAME_ISA
#endif

}  // namespace flame
