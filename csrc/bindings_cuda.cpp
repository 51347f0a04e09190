// Python entry points of the CUDA operations. Device pointers and streams cross as integers: no
// dependency on any tensor library. backends/cuda_call.py checks devices, types, shapes; sizes that
// the arguments imply are its business too.
//
// A function that needs a workspace only returns its size in bytes where workspace = 0, and with
// one it runs and returns 0.
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>

#include "bindings.h"
#include "bindings_networks.h"
#include "check.h"
#include "cuda/training.h"

namespace flame {

#if defined(FLAME_HAVE_CUDA)

namespace {

namespace py = pybind11;
using Pointer = uintptr_t;

template <typename T>
T* at(Pointer pointer) {
    return reinterpret_cast<T*>(pointer);
}

template <typename Args, typename Run>
size_t with_workspace(const Args& args, Pointer workspace, Run&& run) {
    const WithoutGil without_gil;
    if (workspace == 0) return cuda_workspace_bytes(args);
    run(at<void>(workspace));
    return 0;
}

void mlp_forward(const MlpSpec& spec, Pointer parameters, int64_t rows, Pointer input,
                 Pointer output, Pointer stream) {
    const MlpForwardArgs args{spec,          at<float>(parameters), rows, at<float>(input),
                              spec.sizes[0], at<float>(output)};
    const WithoutGil without_gil;
    cuda_mlp_forward(args, at<void>(stream));
}

size_t twin_q(const MlpSpec& spec, Pointer parameters, int64_t states, int candidates,
              int action_dim, Pointer obs, Pointer actions, Pointer q_min, bool tensor_cores,
              Pointer workspace, Pointer stream) {
    const TwinQArgs args{spec,
                         at<float>(parameters),
                         states,
                         candidates,
                         action_dim,
                         at<float>(obs),
                         critic_obs_dim(spec, action_dim),
                         at<float>(actions),
                         at<float>(q_min),
                         nullptr};
    return with_workspace(args, workspace, [&](void* memory) {
        cuda_twin_q(args, tensor_cores, memory, at<void>(stream));
    });
}

size_t critic_step(const MlpSpec& spec, Pointer parameters, Pointer gradients, int64_t rows,
                   int action_dim, Pointer obs, Pointer action, Pointer target, Pointer loss,
                   Pointer q_mean, Pointer workspace, Pointer stream) {
    const CriticStepArgs args{spec,
                              at<float>(parameters),
                              at<float>(gradients),
                              rows,
                              action_dim,
                              at<float>(obs),
                              critic_obs_dim(spec, action_dim),
                              at<float>(action),
                              action_dim,
                              at<float>(target),
                              at<double>(loss),
                              at<double>(q_mean),
                              nullptr};
    return with_workspace(args, workspace,
                          [&](void* memory) { cuda_critic_step(args, memory, at<void>(stream)); });
}

size_t q_gradient(const MlpSpec& spec, Pointer parameters, int64_t rows, int action_dim,
                  Pointer obs, Pointer action, Pointer q_min, Pointer gradient, Pointer workspace,
                  Pointer stream) {
    const QGradientArgs args{spec,
                             at<float>(parameters),
                             rows,
                             action_dim,
                             at<float>(obs),
                             critic_obs_dim(spec, action_dim),
                             at<float>(action),
                             action_dim,
                             at<float>(q_min),
                             at<float>(gradient)};
    return with_workspace(args, workspace,
                          [&](void* memory) { cuda_q_gradient(args, memory, at<void>(stream)); });
}

size_t meanflow_step(const MlpSpec& spec, Pointer parameters, Pointer gradients, int64_t rows,
                     Pointer obs, Pointer z, Pointer velocity, Pointer r, Pointer t, Pointer loss,
                     Pointer workspace, Pointer stream) {
    const int action_dim = spec.sizes[spec.num_layers];
    const MeanFlowStepArgs args{spec,
                                at<float>(parameters),
                                at<float>(gradients),
                                rows,
                                action_dim,
                                at<float>(obs),
                                flow_obs_dim(spec, kTimeFeatures),
                                at<float>(z),
                                at<float>(velocity),
                                at<float>(r),
                                at<float>(t),
                                at<double>(loss)};
    return with_workspace(
        args, workspace, [&](void* memory) { cuda_meanflow_step(args, memory, at<void>(stream)); });
}

size_t reweighted_velocity(const MlpSpec& spec, Pointer parameters, int64_t states, int candidates,
                           int action_dim, Pointer obs, Pointer z, Pointer signal, Pointer scale,
                           Pointer alpha, const std::string& sampling, Pointer seed,
                           Pointer velocity, Pointer ess, bool tensor_cores, Pointer workspace,
                           Pointer stream) {
    check(candidates >= 1, "num_candidates is ", candidates, "; at least 1 is needed");
    check(action_dim <= kMaxActionColumns, "z has ", action_dim, " columns; at most ",
          kMaxActionColumns, " are supported");
    const CudaReweighted args{
        {spec, at<float>(parameters), nullptr, states, candidates, action_dim, at<float>(obs),
         critic_obs_dim(spec, action_dim), at<float>(z), at<float>(signal), at<float>(scale), 0.0,
         parse_candidates(sampling), nullptr, 0, 0, 0, at<float>(velocity), at<float>(ess)},
        at<double>(alpha),
        at<uint64_t>(seed)};
    return with_workspace(args, workspace, [&](void* memory) {
        cuda_reweighted_velocity(args, tensor_cores, memory, at<void>(stream));
    });
}

void flow_density(const MlpSpec& spec, Pointer parameters, int64_t states, int samples, Pointer obs,
                  Pointer noise, int steps, int time_features, Pointer time, Pointer scale,
                  const std::string& divergence, Pointer probe, Pointer action, Pointer log_prob,
                  Pointer folded, Pointer stream) {
    const int action_dim = spec.sizes[spec.num_layers];
    const FlowDensityArgs args{spec,
                               at<float>(parameters),
                               states,
                               samples,
                               action_dim,
                               at<float>(obs),
                               flow_obs_dim(spec, time_features),
                               at<float>(noise),
                               steps,
                               time_features,
                               at<float>(time),
                               at<float>(scale),
                               parse_divergence(divergence),
                               at<float>(probe),
                               at<float>(action),
                               at<float>(log_prob),
                               at<bool>(folded),
                               nullptr};
    const WithoutGil without_gil;
    cuda_flow_density(args, at<void>(stream));
}

// One step of one sample per state, with its exact density.
FlowDensityArgs recorded_step(const MlpSpec& spec, Pointer parameters, int64_t rows,
                              int time_features, Pointer scale) {
    FlowDensityArgs args{};
    args.spec = spec;
    args.parameters = at<float>(parameters);
    args.states = rows;
    args.samples = 1;
    args.action_dim = spec.sizes[spec.num_layers];
    args.steps = 1;
    args.time_features = time_features;
    args.scale = at<float>(scale);
    args.divergence = Divergence::kLogDet;
    return args;
}

size_t flow_record(const MlpSpec& spec, Pointer parameters, int64_t rows, int time_features,
                   Pointer scale, Pointer time, Pointer obs, Pointer noise, Pointer action,
                   Pointer log_prob, Pointer folded, Pointer transport, Pointer record,
                   Pointer stream) {
    FlowDensityArgs args = recorded_step(spec, parameters, rows, time_features, scale);
    args.time = at<float>(time);
    args.obs = at<float>(obs);
    args.obs_ld = flow_obs_dim(spec, time_features);
    args.noise = at<float>(noise);
    args.action = at<float>(action);
    args.log_prob = at<float>(log_prob);
    args.folded = at<bool>(folded);
    args.transport = at<float>(transport);
    return with_workspace(args, record,
                          [&](void* memory) { cuda_flow_record(args, memory, at<void>(stream)); });
}

size_t flow_backward(const MlpSpec& spec, Pointer parameters, int64_t rows, int time_features,
                     Pointer scale, Pointer record, Pointer gradients, Pointer d_action,
                     Pointer d_log_prob, Pointer d_transport, Pointer workspace, Pointer stream) {
    const FlowGradientArgs args{recorded_step(spec, parameters, rows, time_features, scale),
                                at<void>(record),
                                {nullptr, at<float>(gradients), at<float>(d_action),
                                 at<float>(d_log_prob), at<float>(d_transport)}};
    return with_workspace(
        args, workspace, [&](void* memory) { cuda_flow_backward(args, memory, at<void>(stream)); });
}

// critics: null with one sample per state.
size_t policy_act(const MlpSpec& policy, Pointer parameters, const MlpSpec* critics,
                  Pointer critic_parameters, int64_t states, int samples, Pointer obs,
                  Pointer noise, int steps, int time_features, Pointer time, Pointer scale,
                  Pointer action, bool tensor_cores, Pointer workspace, Pointer stream) {
    const int action_dim = policy.sizes[policy.num_layers];
    const int obs_dim = flow_obs_dim(policy, time_features);
    if (critics != nullptr) {
        check(critic_obs_dim(*critics, action_dim) == obs_dim, "the policy takes ", obs_dim,
              " observations, the critics ", critic_obs_dim(*critics, action_dim));
    }
    const PolicyActArgs args{policy,
                             at<float>(parameters),
                             critics != nullptr ? *critics : MlpSpec{},
                             at<float>(critic_parameters),
                             states,
                             samples,
                             action_dim,
                             at<float>(obs),
                             obs_dim,
                             at<float>(noise),
                             steps,
                             time_features,
                             at<float>(time),
                             at<float>(scale),
                             at<float>(action),
                             tensor_cores};
    return with_workspace(args, workspace,
                          [&](void* memory) { cuda_policy_act(args, memory, at<void>(stream)); });
}

void adam(int64_t count, Pointer parameters, Pointer gradients, Pointer first_moment,
          Pointer second_moment, double beta1, double beta2, double epsilon, Pointer schedule,
          Pointer stream) {
    const AdamArgs args{count,
                        at<float>(parameters),
                        at<float>(gradients),
                        at<float>(first_moment),
                        at<float>(second_moment),
                        0,
                        0.0,
                        beta1,
                        beta2,
                        epsilon};
    const WithoutGil without_gil;
    cuda_adam(args, at<AdamSchedule>(schedule), at<void>(stream));
}

void soft_update(int64_t count, Pointer target, Pointer online, float tau, Pointer stream) {
    const WithoutGil without_gil;
    cuda_soft_update({count, at<float>(target), at<float>(online), tau}, at<void>(stream));
}

void py_monotonicity_gap(int64_t rows, int n, Pointer transport, double margin, Pointer gap,
                         Pointer gradient, Pointer stream) {
    check(n <= kMaxActionColumns, "transport has ", n, " columns; at most ", kMaxActionColumns,
          " are supported");
    const WithoutGil without_gil;
    cuda_monotonicity_gap(
        {rows, n, at<float>(transport), margin, at<float>(gap), at<float>(gradient)},
        at<void>(stream));
}

// Rows `*_ld` floats apart, or entries of a column.
size_t py_critic_updates(const PolicySampler& policy, Pointer policy_parameters,
                         const MlpSpec& critics,
                         const std::optional<std::pair<MlpSpec, Pointer>>& pair, Pointer parameters,
                         Pointer first_moment, Pointer second_moment, Pointer target_parameters,
                         int updates, int64_t rows, Pointer obs, int64_t obs_ld, Pointer action,
                         int64_t action_ld, Pointer reward, int64_t reward_ld, Pointer discount,
                         int64_t discount_ld, Pointer next_obs, int64_t next_obs_ld, Pointer noise,
                         float reward_scale, Pointer alpha, float tau, double beta1, double beta2,
                         double epsilon, Pointer time, Pointer scale, Pointer schedule,
                         Pointer loss, Pointer q_mean, Pointer workspace, Pointer stream) {
    check(policy.is_flow(), "the fused updates draw from flow policies only");
    PairEncoder encoder{};
    if (pair) {
        check_pair_encoder(pair->first, policy.action_dim);
        encoder = {pair->first, at<float>(pair->second)};
    }
    const PairEncoder* seen = pair ? &encoder : nullptr;
    shared_obs_dim(policy, critics, pair_columns(seen));
    const CudaCriticUpdates args{{&policy,
                                  at<float>(policy_parameters),
                                  critics,
                                  seen,
                                  count_of(critics),
                                  at<float>(parameters),
                                  at<float>(first_moment),
                                  at<float>(second_moment),
                                  at<float>(target_parameters),
                                  updates,
                                  rows,
                                  at<float>(obs),
                                  obs_ld,
                                  at<float>(action),
                                  action_ld,
                                  at<float>(reward),
                                  reward_ld,
                                  at<float>(discount),
                                  discount_ld,
                                  at<float>(next_obs),
                                  next_obs_ld,
                                  at<float>(noise),
                                  reward_scale,
                                  0.0f,
                                  tau,
                                  0,
                                  0.0,
                                  beta1,
                                  beta2,
                                  epsilon},
                                 at<float>(time),
                                 at<float>(scale),
                                 at<AdamSchedule>(schedule),
                                 at<double>(alpha),
                                 at<double>(loss),
                                 at<double>(q_mean)};
    return with_workspace(args, workspace, [&](void* memory) {
        cuda_critic_updates(args, memory, at<void>(stream));
    });
}

}  // namespace

void bind_cuda(py::module_& m) {
    m.def("cuda_mlp_forward", &mlp_forward);
    m.def("cuda_twin_q", &twin_q);
    m.def("cuda_critic_step", &critic_step);
    m.def("cuda_q_gradient", &q_gradient);
    m.def("cuda_meanflow_step", &meanflow_step);
    m.def("cuda_reweighted_velocity", &reweighted_velocity);
    m.def("cuda_flow_density", &flow_density);
    m.def("cuda_flow_record", &flow_record);
    m.def("cuda_flow_backward", &flow_backward);
    m.def("cuda_policy_act", &policy_act);
    m.def("cuda_adam", &adam);
    m.def("cuda_soft_update", &soft_update);
    m.def("cuda_monotonicity_gap", &py_monotonicity_gap);
    m.def("cuda_critic_updates", &py_critic_updates);
}

#else

void bind_cuda(pybind11::module_&) {}

#endif

}  // namespace flame
