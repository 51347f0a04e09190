// The CUDA kernels' bodies executed on the host, so that tests can check them without a GPU.
#pragma once

#include <stddef.h>

#include "cpu/kernels.h"

namespace flame {

// A table that runs every CUDA operation block by block, thread by thread (cuda/block.h). falling:
// threads and blocks in falling order, which a correct kernel does not notice. shared_bytes: the
// device's shared memory per block, which decides the tiles. Operations without a CUDA kernel
// throw.
const CpuKernels* cuda_on_host(bool falling, size_t shared_bytes);

}  // namespace flame
