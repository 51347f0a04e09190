// Philox on the device: the same header as on the CPU, so the same bits, uniforms and normals.
//
// out (n): device pointer, owned by the caller, 4-byte aligned. One thread computes one block, four
// draws; 16 bytes written per thread and about 120 integer operations, so the store is not the
// limit and no vector store is needed.
#include "cuda/cuda_check.h"
#include "cuda/device.h"
#include "partition.h"
#include "philox.h"

namespace flame {
namespace {

constexpr int kThreads = 256;

enum class Draw { kBits, kNormal };

template <Draw draw>
__global__ void __launch_bounds__(kThreads)
    philox_kernel(PhiloxKey key, int64_t n, void* __restrict__ out) {
    const int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t first = 4 * block;
    if (first >= n) return;
    const uint64_t counter = key.offset + static_cast<uint64_t>(block);
    const int64_t count = n - first < 4 ? n - first : 4;
    if constexpr (draw == Draw::kBits) {
        const PhiloxBlock bits = philox_block(key.seed, key.stream, counter);
        for (int64_t i = 0; i < count; ++i) static_cast<uint32_t*>(out)[first + i] = bits.v[i];
    } else {
        float normals[4];
        normal_block(key.seed, key.stream, counter, normals);
        for (int64_t i = 0; i < count; ++i) static_cast<float*>(out)[first + i] = normals[i];
    }
}

template <Draw draw>
void launch(const PhiloxKey& key, int64_t n, void* out, void* stream) {
    if (n == 0) return;
    const int64_t blocks = divide_up(divide_up(n, 4), kThreads);
    philox_kernel<draw>
        <<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(key, n,
                                                                                            out);
    cuda_check(cudaGetLastError(), "philox_kernel");
}

}  // namespace

void cuda_philox_bits(const PhiloxKey& key, int64_t n, uint32_t* out, void* stream) {
    launch<Draw::kBits>(key, n, out, stream);
}

void cuda_philox_normal(const PhiloxKey& key, int64_t n, float* out, void* stream) {
    launch<Draw::kNormal>(key, n, out, stream);
}

}  // namespace flame
