#include "cuda/flow_backward.h"

#include "cuda/training.h"

namespace flame {

void cuda_flow_backward(const FlowGradientArgs& args, void* workspace, void* stream) {
    isa_cuda::Carver memory(workspace);
    isa_cuda::flow_backward(isa_cuda::Launcher(stream), args, memory);
}

size_t cuda_workspace_bytes(const FlowGradientArgs& args) {
    isa_cuda::Carver memory(nullptr);
    isa_cuda::carve_flow_backward(isa_cuda::Launcher(nullptr), args, memory);
    return memory.used();
}

}  // namespace flame
