// What a kernel source is compiled for. Kernel bodies are ordinary C++ on top of cuda/block.h; nvcc
// compiles them for the device, the C++ compiler for the host, where tests execute them whole. Each
// target has its own namespace, as each instruction set of cpu/ has: FLAME_ISA.
#pragma once

#define FLAME_SCALAR 1

#if defined(__CUDACC__)
#define FLAME_ISA isa_cuda
#define FLAME_INLINE static __device__ __forceinline__
#define FLAME_BODY __device__ __forceinline__
#define FLAME_UNROLL _Pragma("unroll")
#else
#define FLAME_ISA isa_cuda_on_host
#define FLAME_INLINE static inline __attribute__((always_inline, unused))
#define FLAME_BODY inline
#define FLAME_UNROLL
#endif
