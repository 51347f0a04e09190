// Launching a kernel: on a CUDA stream, or block by block on the host.
//
// A kernel is a plain struct of its arguments whose operator()(Block) is the body. Operations are
// written once over Launcher; nothing here allocates, synchronises or draws, so that a sequence of
// launches can be captured in a CUDA graph.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cuda/block.h"
#include "partition.h"
#if defined(__CUDACC__)
#include "cuda/cuda_check.h"
#else
#include <cmath>
#include <vector>
#endif

namespace flame::FLAME_ISA {

// Cuts a caller's workspace into arrays at multiples of 256 bytes. With a null base it only counts.
class Carver {
  public:
    explicit Carver(void* base) : base_(static_cast<char*>(base)) {}

    template <typename T>
    T* array(size_t count) {
        constexpr size_t kAlignment = 256;
        T* at = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
        used_ += round_up(count * sizeof(T), kAlignment);
        return at;
    }
    float* floats(size_t count) { return array<float>(count); }
    size_t used() const { return used_; }

  private:
    char* base_;
    size_t used_ = 0;
};

#if defined(__CUDACC__)

template <typename Kernel>
__global__ void __launch_bounds__(kThreads, 1) run_kernel(const __grid_constant__ Kernel kernel) {
    extern __shared__ float4 shared[];
    kernel(Block{static_cast<int64_t>(blockIdx.x), reinterpret_cast<float*>(shared)});
}

class Launcher {
  public:
    explicit Launcher(void* stream) : stream_(static_cast<cudaStream_t>(stream)) {
        int device = 0;
        cuda_check(cudaGetDevice(&device), "cudaGetDevice");
        int bytes = 0;
        cuda_check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                   "cudaDeviceGetAttribute");
        shared_limit_ = static_cast<size_t>(bytes) / sizeof(float);
    }

    size_t shared_limit() const { return shared_limit_; }  // floats per block

    template <typename Kernel>
    void operator()(const Kernel& kernel, int64_t blocks, size_t shared_floats) const {
        if (blocks == 0) return;
        const size_t bytes = shared_floats * sizeof(float);
        cuda_check(
            cudaFuncSetAttribute(run_kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(bytes)),
            "cudaFuncSetAttribute");
        run_kernel<Kernel><<<static_cast<unsigned>(blocks), kThreads, bytes, stream_>>>(kernel);
        cuda_check(cudaGetLastError(), Kernel::kName);
    }

  private:
    cudaStream_t stream_;
    size_t shared_limit_;
};

#else

class Launcher {
  public:
    Launcher(bool falling, size_t shared_limit) : falling_(falling), shared_limit_(shared_limit) {}

    size_t shared_limit() const { return shared_limit_; }

    // Shared memory starts as NaN: a value that no thread wrote shows in the results.
    template <typename Kernel>
    void operator()(const Kernel& kernel, int64_t blocks, size_t shared_floats) const {
        struct alignas(16) Vector {
            float v[4];
        };
        std::vector<Vector> shared((shared_floats + 3) / 4);
        for (int64_t b = 0; b < blocks; ++b) {
            for (Vector& x : shared) x = {{NAN, NAN, NAN, NAN}};
            kernel(Block{falling_ ? blocks - 1 - b : b, reinterpret_cast<float*>(shared.data()),
                         falling_});
        }
    }

  private:
    bool falling_;
    size_t shared_limit_;
};

#endif

}  // namespace flame::FLAME_ISA
