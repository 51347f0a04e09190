// The CUDA kernels' bodies executed on the host, so that tests can check them without a GPU.
#pragma once

#include <stddef.h>

#include "cpu/kernels.h"
#include "cuda/training.h"

namespace flame {

// A table that runs every CUDA operation block by block, thread by thread (cuda/block.h). falling:
// threads and blocks in falling order, which a correct kernel does not notice. shared_bytes: the
// device's shared memory per block, which decides the tiles. Operations without a CUDA kernel
// throw.
const CpuKernels* cuda_on_host(bool falling, size_t shared_bytes);

// Acting on a device of so many multiprocessors, each with one of the blocks that cooperate.
struct HostDevice {
    bool falling;
    size_t shared_bytes;
    int multiprocessors;
};
void policy_act_on_host(const PolicyActArgs& args, const HostDevice& device);

}  // namespace flame
