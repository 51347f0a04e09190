// What the machine has. Works without a driver: then there are no devices.
#include <cstdio>
#include <string>

#include "cuda/cuda_check.h"
#include "cuda/device.h"

namespace flame {

int cuda_device_count(std::string* problem) {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaSuccess) return count;
    cudaGetLastError();
    int driver = 0;  // stays 0 where there is none
    cudaDriverGetVersion(&driver);
    if (problem != nullptr && driver != 0 && status != cudaErrorNoDevice) {
        *problem = cudaGetErrorString(status);
    }
    return 0;
}

void cuda_device_name(int device, char* name, int size, int* major, int* minor) {
    cudaDeviceProp properties;
    cuda_check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
    std::snprintf(name, static_cast<size_t>(size), "%s", properties.name);
    *major = properties.major;
    *minor = properties.minor;
}

}  // namespace flame
