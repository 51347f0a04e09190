// A float's 32 bits and back, on host and device.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define FLAME_HD static __host__ __device__ __forceinline__
#else
// static: each translation unit keeps its own copy, compiled for its own instruction set.
#define FLAME_HD static inline __attribute__((always_inline, unused))
#endif

namespace flame {

#if defined(__CUDA_ARCH__)
FLAME_HD float bits_to_float(uint32_t b) { return __uint_as_float(b); }
FLAME_HD uint32_t float_to_bits(float a) { return __float_as_uint(a); }
#else
FLAME_HD float bits_to_float(uint32_t b) {
    float a;
    __builtin_memcpy(&a, &b, sizeof(a));
    return a;
}
FLAME_HD uint32_t float_to_bits(float a) {
    uint32_t b;
    __builtin_memcpy(&b, &a, sizeof(b));
    return b;
}
#endif

}  // namespace flame
