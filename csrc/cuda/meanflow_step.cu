#include "cuda/meanflow_step.h"

#include "cuda/training.h"

namespace flame {

void cuda_meanflow_step(const MeanFlowStepArgs& args, void* workspace, void* stream) {
    isa_cuda::Carver memory(workspace);
    isa_cuda::meanflow_step(isa_cuda::Launcher(stream), args, memory);
}

size_t cuda_workspace_bytes(const MeanFlowStepArgs& args) {
    isa_cuda::Carver memory(nullptr);
    isa_cuda::carve_meanflow_step(isa_cuda::Launcher(nullptr), args, memory);
    return memory.used();
}

}  // namespace flame
