// The CUDA training operations: the argument structs of cpu/training.h with device pointers.
//
// Every function only launches kernels on `stream` (a cudaStream_t of the current device): no
// allocation, no synchronisation, no random state on the host, so a CUDA graph can capture it.
// `workspace` is device memory of the caller, 256-byte aligned, of cuda_workspace_bytes(args); it
// may be reused as soon as the stream has passed the call. Declared always, defined only in a build
// with CUDA.
#pragma once

#include <stddef.h>

#include "cpu/training.h"

namespace flame {

// What an optimizer keeps in device memory: the kernel counts the step, the caller sets the rate.
struct AdamSchedule {
    double learning_rate;
    int64_t step;  // taken so far
};

// Gradients of a loss with respect to the results of a pass that cuda_flow_record was given as
// `recorded` and left in `record`. deltas.tape is not read.
struct FlowGradientArgs {
    FlowDensityArgs recorded;
    void* record;
    FlowBackwardArgs deltas;
};

void cuda_mlp_forward(const MlpForwardArgs& args, void* stream);
// tensor_cores: the candidates' products there, to the accuracy of fp32 (tensor_product.h).
void cuda_twin_q(const TwinQArgs& args, bool tensor_cores, void* workspace, void* stream);
void cuda_critic_step(const CriticStepArgs& args, void* workspace, void* stream);
void cuda_q_gradient(const QGradientArgs& args, void* workspace, void* stream);
void cuda_meanflow_step(const MeanFlowStepArgs& args, void* workspace, void* stream);
void cuda_flow_density(const FlowDensityArgs& args, void* stream);
// record: a workspace to be kept until the last cuda_flow_backward, like the parameters.
void cuda_flow_record(const FlowDensityArgs& args, void* record, void* stream);
void cuda_flow_backward(const FlowGradientArgs& args, void* workspace, void* stream);
// draw_offset: in device memory, Philox blocks added to args.offset; or null.
void cuda_reweighted_velocity(const ReweightedArgs& args, const uint64_t* draw_offset,
                              bool tensor_cores, void* workspace, void* stream);
// args.step and args.learning_rate are not read: the schedule, in device memory, has them.
void cuda_adam(const AdamArgs& args, AdamSchedule* schedule, void* stream);
void cuda_soft_update(const SoftUpdateArgs& args, void* stream);

size_t cuda_workspace_bytes(const TwinQArgs& args);
size_t cuda_workspace_bytes(const CriticStepArgs& args);
size_t cuda_workspace_bytes(const QGradientArgs& args);
size_t cuda_workspace_bytes(const MeanFlowStepArgs& args);
size_t cuda_workspace_bytes(const FlowDensityArgs& args);  // of cuda_flow_record
size_t cuda_workspace_bytes(const FlowGradientArgs& args);
size_t cuda_workspace_bytes(const ReweightedArgs& args);

}  // namespace flame
