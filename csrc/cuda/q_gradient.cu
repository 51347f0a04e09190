#include "cuda/q_gradient.h"

#include "cuda/training.h"

namespace flame {

void cuda_q_gradient(const QGradientArgs& args, void* workspace, void* stream) {
    isa_cuda::Carver memory(workspace);
    isa_cuda::q_gradient(isa_cuda::Launcher(stream), args, memory);
}

size_t cuda_workspace_bytes(const QGradientArgs& args) {
    isa_cuda::Carver memory(nullptr);
    isa_cuda::carve_q_gradient(isa_cuda::Launcher(nullptr), args, memory);
    return memory.used();
}

}  // namespace flame
