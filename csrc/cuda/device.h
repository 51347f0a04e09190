// What the bindings ask of CUDA itself (cuda/device.cu, cuda/philox.cu); defined only in a build
// with CUDA.
#pragma once

#include <stdint.h>

#include <string>

#include "api.h"

namespace flame {

// 0 where there is no driver or no device, or where a problem (which is then set) hides them.
int cuda_device_count(std::string* problem = nullptr);
// Name and compute capability of a device, truncated to `size` characters; throws without devices.
void cuda_device_name(int device, char* name, int size, int* major, int* minor);
// The first n draws of `key` into device memory, on `stream` (a cudaStream_t).
void cuda_philox_bits(const PhiloxKey& key, int64_t n, uint32_t* out, void* stream);
void cuda_philox_normal(const PhiloxKey& key, int64_t n, float* out, void* stream);

}  // namespace flame
