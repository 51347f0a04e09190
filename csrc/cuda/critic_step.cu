#include "cuda/critic_step.h"

#include "cuda/training.h"

namespace flame {

void cuda_critic_step(const CriticStepArgs& args, void* workspace, void* stream) {
    isa_cuda::Carver memory(workspace);
    isa_cuda::critic_step(isa_cuda::Launcher(stream), args, memory);
}

size_t cuda_workspace_bytes(const CriticStepArgs& args) {
    isa_cuda::Carver memory(nullptr);
    isa_cuda::carve_critic_step(isa_cuda::Launcher(nullptr), args, memory);
    return memory.used();
}

}  // namespace flame
