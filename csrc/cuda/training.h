// The CUDA operations: acting, and training with the argument structs of cpu/training.h. Pointers
// are device pointers.
//
// Every function only launches kernels on `stream` (a cudaStream_t of the current device): no
// allocation, no synchronisation, no random state on the host, so a CUDA graph can capture it.
// `workspace` is device memory of the caller, 256-byte aligned, of cuda_workspace_bytes(args); it
// may be reused as soon as the stream has passed the call. Declared always, defined only in a build
// with CUDA.
#pragma once

#include <stddef.h>

#include "cpu/training.h"
#include "critic_updates.h"
#include "monotonicity.h"

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

// Updates whose pointers are device memory, with what takes the place of host memory in them: the
// sampler's tables, Adam's rate and step, the temperature.
struct CudaCriticUpdates {
    CriticUpdates updates;  // .step, .learning_rate and .alpha are not read
    const float* time;      // (steps, time_features)
    const float* scale;     // (steps)
    AdamSchedule* schedule;
    const double* alpha;  // null leaves the density out of the target
    double* loss;         // (updates, members)
    double* q_mean;       // (updates, members)
};

// Candidates whose temperature and seed a captured graph may change between replays.
struct CudaReweighted {
    ReweightedArgs reweighted;  // .alpha and .seed are not read
    const double* alpha;
    const uint64_t* seed;
};

// action[s] = the best by Qmin of the `samples` actions that z <- z + scale_i u(z, time_i, s),
// i < steps, makes of a state's noise, clipped to [-1, 1]. Of equals the first; an action whose Q
// is NaN is taken only where all are.
struct PolicyActArgs {
    MlpSpec policy;
    const float* parameters;
    MlpSpec critics;  // not read with one sample, like their parameters
    const float* critic_parameters;
    int64_t states;
    int32_t samples;  // per state
    int32_t action_dim;
    const float* obs;  // (states, O)
    int64_t obs_ld;
    const float* noise;  // (states, samples, A) dense
    int32_t steps;
    int32_t time_features;
    const float* time;   // (steps, time_features)
    const float* scale;  // (steps)
    float* action;       // (states, A)
    bool tensor_cores;   // where many candidates are compared, as in cuda_twin_q
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
void cuda_reweighted_velocity(const CudaReweighted& args, bool tensor_cores, void* workspace,
                              void* stream);
void cuda_policy_act(const PolicyActArgs& args, void* workspace, void* stream);
// args.step and args.learning_rate are not read: the schedule, in device memory, has them.
void cuda_adam(const AdamArgs& args, AdamSchedule* schedule, void* stream);
void cuda_soft_update(const SoftUpdateArgs& args, void* stream);
void cuda_monotonicity_gap(const MonotonicityArgs& args, void* stream);
// Of a flow's critics.
void cuda_critic_updates(const CudaCriticUpdates& args, void* workspace, void* stream);

size_t cuda_workspace_bytes(const TwinQArgs& args);
size_t cuda_workspace_bytes(const CriticStepArgs& args);
size_t cuda_workspace_bytes(const QGradientArgs& args);
size_t cuda_workspace_bytes(const MeanFlowStepArgs& args);
size_t cuda_workspace_bytes(const FlowDensityArgs& args);  // of cuda_flow_record
size_t cuda_workspace_bytes(const FlowGradientArgs& args);
size_t cuda_workspace_bytes(const CudaReweighted& args);
size_t cuda_workspace_bytes(const PolicyActArgs& args);
size_t cuda_workspace_bytes(const CudaCriticUpdates& args);

}  // namespace flame
