// The CUDA training operations: the argument structs of cpu/training.h with device pointers.
//
// Every function only launches kernels on `stream` (a cudaStream_t of the current device): no
// allocation, no synchronisation, no random state on the host, so a CUDA graph can capture it.
// `workspace` is device memory of the caller, 256-byte aligned, of cuda_workspace_bytes(args); it
// may be reused as soon as the stream has passed the call. Declared always, defined only in a build
// with CUDA.
#pragma once

#include <stddef.h>

#include "cpu/training.h"

namespace flame {

void cuda_mlp_forward(const MlpForwardArgs& args, void* stream);
void cuda_twin_q(const TwinQArgs& args, void* workspace, void* stream);

}  // namespace flame
