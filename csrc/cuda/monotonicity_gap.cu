#include "cuda/monotonicity_gap.h"

#include "cuda/training.h"

namespace flame {

void cuda_monotonicity_gap(const MonotonicityArgs& args, void* stream) {
    isa_cuda::monotonicity_gap(isa_cuda::Launcher(stream), args);
}

}  // namespace flame
