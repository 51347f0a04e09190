#include "cuda/critic_sequence.h"

namespace flame {
namespace {

struct DeviceOperations {
    void* stream;
    isa_cuda::Launcher launch;

    explicit DeviceOperations(void* on) : stream(on), launch(on) {}

    template <typename Args>
    size_t bytes(const Args& args) const {
        return cuda_workspace_bytes(args);
    }
    void run(const MlpForwardArgs& args) const { cuda_mlp_forward(args, stream); }
    void run(const FlowDensityArgs& args) const { cuda_flow_density(args, stream); }
    void run(const TwinQArgs& args, void* memory) const {
        cuda_twin_q(args, false, memory, stream);
    }
    void run(const CriticStepArgs& args, void* memory) const {
        cuda_critic_step(args, memory, stream);
    }
    void run(const AdamArgs& args, AdamSchedule* schedule) const {
        cuda_adam(args, schedule, stream);
    }
    void run(const SoftUpdateArgs& args) const { cuda_soft_update(args, stream); }
};

}  // namespace

void cuda_critic_updates(const CudaCriticUpdates& args, void* workspace, void* stream) {
    isa_cuda::critic_updates(DeviceOperations(stream), args, workspace);
}

size_t cuda_workspace_bytes(const CudaCriticUpdates& args) {
    return isa_cuda::critic_updates_bytes(DeviceOperations(nullptr), args);
}

}  // namespace flame
