#include "cuda/reweighted_velocity.h"

#include "cuda/training.h"

namespace flame {

void cuda_reweighted_velocity(const CudaReweighted& args, bool tensor_cores, void* workspace,
                              void* stream) {
    isa_cuda::Carver memory(workspace);
    isa_cuda::reweighted_velocity(isa_cuda::Launcher(stream), args, tensor_cores, memory);
}

size_t cuda_workspace_bytes(const CudaReweighted& args) {
    isa_cuda::Carver memory(nullptr);
    isa_cuda::count_reweighted(args.reweighted, memory);
    return memory.used();
}

}  // namespace flame
