#include "cuda/twin_q.h"

#include "cuda/training.h"

namespace flame {

void cuda_twin_q(const TwinQArgs& args, bool tensor_cores, void* workspace, void* stream) {
    isa_cuda::Carver memory(workspace);
    isa_cuda::twin_q(isa_cuda::Launcher(stream), args, tensor_cores, memory);
}

size_t cuda_workspace_bytes(const TwinQArgs& args) {
    isa_cuda::Carver memory(nullptr);
    isa_cuda::carve_twin_q(args, memory);
    return memory.used();
}

}  // namespace flame
