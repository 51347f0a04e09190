// Launching a kernel: on a CUDA stream, or block by block on the host.
//
// A kernel is a plain struct of its arguments whose operator()(Block) is the body. Operations are
// written once over Launcher; nothing here allocates, synchronises or draws, so that a sequence of
// launches can be captured in a CUDA graph.
//
// Blocks may also cooperate: operator()(Block, stage) is called for one stage after the other, with
// a barrier of all blocks between two stages. That is CUDA's cooperative launch and grid barrier,
// because both hold on every architecture: the launch starts when all blocks fit at once, so that
// two waiting grids cannot starve each other, and the barrier's counter belongs to the launch,
// which leaves nothing to be reset between replays of a graph. (Clusters need sm_90 and end at 16
// blocks.)
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cuda/block.h"
#include "partition.h"
#if defined(__CUDACC__)
#include <cooperative_groups.h>

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

template <typename Kernel>
__global__ void __launch_bounds__(kThreads, 1)
    run_kernel_in_stages(const __grid_constant__ Kernel kernel, int stages) {
    extern __shared__ float4 shared[];
    const Block block{static_cast<int64_t>(blockIdx.x), reinterpret_cast<float*>(shared)};
    for (int stage = 0; stage < stages; ++stage) {
        if (stage > 0) cooperative_groups::this_grid().sync();
        kernel(block, stage);
    }
}

class Launcher {
  public:
    explicit Launcher(void* stream) : stream_(static_cast<cudaStream_t>(stream)) {
        cuda_check(cudaGetDevice(&device_), "cudaGetDevice");
        shared_limit_ =
            static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)) / sizeof(float);
    }

    size_t shared_limit() const { return shared_limit_; }  // floats per block
    // That can run cooperating blocks: none where the device or its driver does not offer it.
    int cooperating_multiprocessors() const {
        return attribute(cudaDevAttrCooperativeLaunch) ? attribute(cudaDevAttrMultiProcessorCount)
                                                       : 0;
    }

    template <typename Kernel>
    void operator()(const Kernel& kernel, int64_t blocks, size_t shared_floats) const {
        if (blocks == 0) return;
        const size_t bytes = allow_shared(run_kernel<Kernel>, shared_floats);
        run_kernel<Kernel><<<static_cast<unsigned>(blocks), kThreads, bytes, stream_>>>(kernel);
        cuda_check(cudaGetLastError(), Kernel::kName);
    }

    // Cooperating blocks, at most one for each multiprocessor.
    template <typename Kernel>
    void in_stages(const Kernel& kernel, int stages, int blocks, size_t shared_floats) const {
        cudaLaunchAttribute cooperative{};
        cooperative.id = cudaLaunchAttributeCooperative;
        cooperative.val.cooperative = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(static_cast<unsigned>(blocks));
        config.blockDim = dim3(kThreads);
        config.dynamicSmemBytes = allow_shared(run_kernel_in_stages<Kernel>, shared_floats);
        config.stream = stream_;
        config.attrs = &cooperative;
        config.numAttrs = 1;
        cuda_check(cudaLaunchKernelEx(&config, run_kernel_in_stages<Kernel>, kernel, stages),
                   Kernel::kName);
    }

  private:
    int attribute(cudaDeviceAttr which) const {
        int value = 0;
        cuda_check(cudaDeviceGetAttribute(&value, which, device_), "cudaDeviceGetAttribute");
        return value;
    }

    // Bytes of that many floats. `function` may use all that a block can have: a limit of this
    // launch would be another one between a second thread's setting and its launch.
    template <typename Function>
    size_t allow_shared(Function* function, size_t floats) const {
        cuda_check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_limit_ * sizeof(float))),
                   "cudaFuncSetAttribute");
        return floats * sizeof(float);
    }

    cudaStream_t stream_;
    int device_ = 0;
    size_t shared_limit_;
};

#else

class Launcher {
  public:
    Launcher(bool falling, size_t shared_limit, int multiprocessors)
        : falling_(falling), shared_limit_(shared_limit), multiprocessors_(multiprocessors) {}

    size_t shared_limit() const { return shared_limit_; }
    int cooperating_multiprocessors() const { return multiprocessors_; }

    template <typename Kernel>
    void operator()(const Kernel& kernel, int64_t blocks, size_t shared_floats) const {
        for (int64_t b = 0; b < blocks; ++b) {
            SharedMemory memory = undefined(shared_floats);
            kernel(Block{ordered(b, blocks), memory.data()->v, falling_});
        }
    }

    template <typename Kernel>
    void in_stages(const Kernel& kernel, int stages, int blocks, size_t shared_floats) const {
        std::vector<SharedMemory> memories(blocks, undefined(shared_floats));
        for (int stage = 0; stage < stages; ++stage) {
            for (int64_t i = 0; i < blocks; ++i) {
                const int64_t b = ordered(i, blocks);
                kernel(Block{b, memories[b].data()->v, falling_}, stage);
            }
        }
    }

  private:
    struct alignas(16) Vector {
        float v[4];
    };
    using SharedMemory = std::vector<Vector>;

    // Starts as NaN: a value that no thread wrote shows in the results. Never empty, as a pointer
    // to it is taken for kernels that use none.
    static SharedMemory undefined(size_t floats) {
        return SharedMemory(floats / 4 + 1, Vector{{NAN, NAN, NAN, NAN}});
    }
    int64_t ordered(int64_t i, int64_t count) const { return falling_ ? count - 1 - i : i; }

    bool falling_;
    size_t shared_limit_;
    int multiprocessors_;
};

#endif

}  // namespace flame::FLAME_ISA
