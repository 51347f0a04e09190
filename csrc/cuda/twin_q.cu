#include "cuda/twin_q.h"

#include "cuda/training.h"

namespace flame {

void cuda_twin_q(const TwinQArgs& args, void* workspace, void* stream) {
    isa_cuda::Carver memory(workspace);
    isa_cuda::twin_q(isa_cuda::Launcher(stream), args, memory);
}

}  // namespace flame
