// What the machine has. Works without a driver: then there are no devices.
#include <cstdio>

#include "api.h"
#include "cuda/cuda_check.h"

namespace flame {

int cuda_device_count() {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) {
        cudaGetLastError();
        return 0;
    }
    return count;
}

void cuda_device_name(int device, char* name, int size, int* major, int* minor) {
    cudaDeviceProp properties;
    cuda_check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
    std::snprintf(name, static_cast<size_t>(size), "%s", properties.name);
    *major = properties.major;
    *minor = properties.minor;
}

}  // namespace flame
