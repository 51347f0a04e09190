#include "cuda/policy_act.h"

#include "cuda/training.h"

namespace flame {

void cuda_policy_act(const PolicyActArgs& args, void* workspace, void* stream) {
    isa_cuda::Carver memory(workspace);
    isa_cuda::policy_act(isa_cuda::Launcher(stream), args, memory);
}

size_t cuda_workspace_bytes(const PolicyActArgs& args) {
    isa_cuda::Carver memory(nullptr);
    isa_cuda::count_policy_act(isa_cuda::Launcher(nullptr), args, memory);
    return memory.used();
}

}  // namespace flame
