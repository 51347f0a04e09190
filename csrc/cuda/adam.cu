#include "cuda/adam.h"

#include "cuda/training.h"

namespace flame {

void cuda_adam(const AdamArgs& args, AdamSchedule* schedule, void* stream) {
    isa_cuda::adam(isa_cuda::Launcher(stream), args, schedule);
}

void cuda_soft_update(const SoftUpdateArgs& args, void* stream) {
    isa_cuda::soft_update(isa_cuda::Launcher(stream), args);
}

}  // namespace flame
