// The CUDA kernels' bodies executed on the host, so that tests can check them without a GPU.
#pragma once

#include <stddef.h>

#include "cpu/kernels.h"
#include "cuda/training.h"

namespace flame {

struct HostDevice {
    bool falling;         // threads and blocks in falling order: a correct kernel does not notice
    size_t shared_bytes;  // of a block, which decides the tiles
    bool tensor_cores;    // for the products that can take them
    int multiprocessors;  // each has one of the blocks that cooperate, 0: none can
};

// A table that runs every CUDA operation block by block, thread by thread (cuda/block.h).
// Operations without a CUDA kernel throw.
const CpuKernels* cuda_on_host(const HostDevice& device);

// y = x w^T by the products of one tile (mlp_tile.h), x (rows, depth), w (columns, depth), y (rows,
// columns). rows_per_warp: 8, 4, 3 or 2; not 3 with tensor cores.
void product_on_host(const float* x, const float* w, int rows, int depth, int columns,
                     int rows_per_warp, const HostDevice& device, float* y);

// The emulated mma (mma.h) of one warp: what each of the 32 lanes holds of A (4), B (2) and D (4).
void mma_on_host(const float* a, const float* b, float* d);

void policy_act_on_host(const PolicyActArgs& args, const HostDevice& device);

}  // namespace flame
