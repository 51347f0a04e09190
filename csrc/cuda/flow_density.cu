#include "cuda/flow_density.h"

#include "cuda/training.h"

namespace flame {

void cuda_flow_density(const FlowDensityArgs& args, void* stream) {
    isa_cuda::flow_density(isa_cuda::Launcher(stream), args);
}

}  // namespace flame
