#include "cuda/mlp_forward.h"

#include "cuda/training.h"

namespace flame {

void cuda_mlp_forward(const MlpForwardArgs& args, void* stream) {
    isa_cuda::mlp_forward(isa_cuda::Launcher(stream), args);
}

}  // namespace flame
