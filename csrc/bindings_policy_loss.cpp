// Python entry points of the policies: how they sample, their losses with gradients, and what the
// losses take beside networks (the tanh Gaussian and the wall against folding).
#include <pybind11/stl.h>

#include <optional>
#include <tuple>
#include <utility>

#include "bindings.h"
#include "bindings_arrays.h"
#include "bindings_networks.h"
#include "cpu/kernels.h"
#include "monotonicity.h"
#include "policy_loss.h"
#include "tanh_gaussian.h"

namespace flame {
namespace {

using Array = py::array_t<float>;

TanhGaussian tanh_gaussian_of(const py::array& output, const py::array& noise,
                              std::pair<float, float> log_std_range) {
    check(noise.ndim() == 2, "noise has shape ", shape_text(noise), "; it must be (B, A)");
    const int64_t rows = noise.shape(0);
    const int64_t action_dim = noise.shape(1);
    return {rows,
            static_cast<int32_t>(action_dim),
            dense(output, "output", {rows, 2 * action_dim}),
            dense(noise, "noise", {rows, action_dim}),
            log_std_range.first,
            log_std_range.second};
}

py::tuple py_tanh_gaussian(const py::array& output, const py::array& noise,
                           std::pair<float, float> log_std_range) {
    const TanhGaussian policy = tanh_gaussian_of(output, noise, log_std_range);
    Array action({policy.rows, static_cast<int64_t>(policy.action_dim)});
    Array log_prob(policy.rows);
    float* actions = action.mutable_data();
    float* log_probs = log_prob.mutable_data();
    {
        const WithoutGil without_gil;
        tanh_gaussian(policy, actions, log_probs);
    }
    return py::make_tuple(action, log_prob);
}

Array py_tanh_gaussian_gradient(const py::array& output, const py::array& noise,
                                const py::array& d_action, const py::array& d_log_prob,
                                std::pair<float, float> log_std_range) {
    const TanhGaussian policy = tanh_gaussian_of(output, noise, log_std_range);
    const int64_t action_dim = policy.action_dim;
    Array d_output({policy.rows, 2 * action_dim});
    const float* by_action = dense(d_action, "d_action", {policy.rows, action_dim});
    const float* by_log_prob = dense(d_log_prob, "d_log_prob", {policy.rows});
    float* by_output = d_output.mutable_data();
    const WithoutGil without_gil;
    tanh_gaussian_gradient(policy, by_action, by_log_prob, by_output);
    return d_output;
}

py::tuple py_monotonicity_gap(const py::array& transport, double margin) {
    check(transport.ndim() == 3 && transport.shape(1) == transport.shape(2), "transport has shape ",
          shape_text(transport), "; it must be (B, A, A)");
    const int64_t rows = transport.shape(0);
    const int64_t n = transport.shape(1);
    Array gap(rows);
    Array gradient({rows, n, n});
    const float* matrices = dense(transport, "transport", {rows, n, n});
    float* gaps = gap.mutable_data();
    float* gradients = gradient.mutable_data();
    {
        const WithoutGil without_gil;
        kernels().monotonicity_gap(
            {rows, static_cast<int32_t>(n), matrices, margin, gaps, gradients});
    }
    return py::make_tuple(gap, gradient);
}

// --- Samplers

PolicySampler gaussian_sampler(const MlpSpec& spec, std::pair<float, float> log_std_range) {
    check(spec.members == 1 && outputs(spec) % 2 == 0,
          "a Gaussian policy has one member and an even ", "number of outputs; this spec has ",
          spec.members, " and ", outputs(spec));
    PolicySampler p{};
    p.spec = spec;
    p.action_dim = outputs(spec) / 2;
    p.log_std_min = log_std_range.first;
    p.log_std_max = log_std_range.second;
    return p;
}

PolicySampler multi_step_sampler(const MlpSpec& spec, const py::array& time) {
    check(time.ndim() == 2 && time.shape(0) >= 1, "time has shape ", shape_text(time),
          "; it must be (steps, features) with at least one step");
    const int64_t steps = time.shape(0);
    const int64_t features = time.shape(1);
    flow_obs_dim(spec, features);
    const float* times = dense(time, "time", {steps, features});
    PolicySampler p{};
    p.spec = spec;
    p.action_dim = outputs(spec);
    p.steps = static_cast<int32_t>(steps);
    p.time_features = static_cast<int32_t>(features);
    p.time.assign(times, times + steps * features);
    return p;
}

PolicySampler flow_sampler(const MlpSpec& spec, const py::array& time, const py::array& scale) {
    PolicySampler p = multi_step_sampler(spec, time);
    const float* scales = dense(scale, "scale", {p.steps});
    p.scale.assign(scales, scales + p.steps);
    return p;
}

PolicySampler denoising_sampler(const MlpSpec& spec, const py::array& time,
                                const py::array& steps) {
    PolicySampler p = multi_step_sampler(spec, time);
    p.denoising = act_steps(dense(steps, "steps", {p.steps, 5}), p.steps);
    return p;
}

Array py_sample(const PolicySampler& policy, const py::array& parameters, const py::array& obs,
                const py::array& noise) {
    check(noise.ndim() == 2, "noise has shape ", shape_text(noise), "; it must be (rows, ",
          policy.action_dim, ")");
    const int64_t rows = noise.shape(0);
    const RowsView s = matrix(obs, "obs", rows, policy_obs_dim(policy));
    const float* weights = dense(parameters, "parameters", {count_of(policy.spec)});
    const float* draws = dense(noise, "noise", {rows, policy.action_dim});
    Array action({rows, static_cast<int64_t>(policy.action_dim)});
    float* actions = action.mutable_data();
    const WithoutGil without_gil;
    sample_actions(policy, weights, rows, s.data, s.ld, draws, actions, nullptr);
    return action;
}

// --- Losses

// Critics as the losses take them: spec, parameters, and the encoder of what they see beside the
// action.
using CriticsView = std::tuple<MlpSpec, py::array, std::optional<NetworkView>>;

// What the losses have in common; `parameters` and `gradients` belong to the policy.
class LossCall {
  public:
    LossCall(const PolicySampler& policy, const py::array& parameters, const py::array& gradients,
             const CriticsView& critics, const py::array& obs, const py::array& noise, double alpha)
        : pair_(std::get<2>(critics), policy.action_dim) {
        check(noise.ndim() == 2 && noise.shape(0) >= 1, "noise has shape ", shape_text(noise),
              "; it must be (rows, ", policy.action_dim, ") with at least one row");
        const auto& [spec, critic_parameters, pair] = critics;
        const int64_t rows = noise.shape(0);
        const int obs_dim = shared_obs_dim(policy, spec, pair_columns(pair_.get()));
        const RowsView s = matrix(obs, "obs", rows, obs_dim);
        const int64_t count = count_of(policy.spec);
        inputs = {&policy,
                  dense(parameters, "parameters", {count}),
                  spec,
                  dense(critic_parameters, "critics' parameters", {count_of(spec)}),
                  pair_.get(),
                  rows,
                  s.data,
                  s.ld,
                  dense(noise, "noise", {rows, policy.action_dim}),
                  alpha};
        this->gradients = writable(gradients, "gradients", {count});
    }
    LossCall(const LossCall&) = delete;
    LossCall& operator=(const LossCall&) = delete;

    PolicyLossInputs inputs{};
    float* gradients = nullptr;

  private:
    PairArgument pair_;  // `inputs` points to it
};

py::tuple py_gaussian_loss(const PolicySampler& policy, const py::array& parameters,
                           const py::array& gradients, const CriticsView& critics,
                           const py::array& obs, const py::array& noise, double alpha) {
    check(policy.steps == 0, "this policy takes steps; gaussian_loss takes a Gaussian");
    const LossCall call(policy, parameters, gradients, critics, obs, noise, alpha);
    ReverseKl result{};
    {
        const WithoutGil without_gil;
        result = gaussian_loss(call.inputs, call.gradients);
    }
    return py::make_tuple(result.loss, result.log_prob);
}

py::tuple py_flow_reverse_kl(const PolicySampler& policy, const py::array& parameters,
                             const py::array& gradients, const CriticsView& critics,
                             const py::array& obs, const py::array& noise, double alpha,
                             double weight, float boundary_width, float monotonicity_margin,
                             float wall_scale) {
    check(policy.is_flow() && policy.steps == 1, "the policy takes ", policy.steps,
          policy.is_flow() ? " steps along a flow" : " steps, not along a flow",
          "; the exact density has a gradient for one step along a flow");
    const LossCall call(policy, parameters, gradients, critics, obs, noise, alpha);
    ReverseKl result{};
    {
        const WithoutGil without_gil;
        result = flow_reverse_kl(call.inputs, {boundary_width, monotonicity_margin, wall_scale},
                                 weight, call.gradients);
    }
    return py::make_tuple(result.loss, result.log_prob, result.fold_rate);
}

py::tuple py_flow_matching(const PolicySampler& policy, const py::array& parameters,
                           const py::array& gradients, const CriticsView& critics,
                           const py::array& obs, const py::array& action, const py::array& noise,
                           const py::array& uniform, double alpha, double weight, double min_time,
                           double instantaneous_fraction, double acting_fraction,
                           int num_candidates, const std::string& sampling, uint64_t seed) {
    check(policy.is_flow(), "this policy is not a flow; flow_matching takes one");
    check(policy.time_features == kTimeFeatures, "the policy takes ", policy.time_features,
          " time features; flow matching needs ", kTimeFeatures);
    check(alpha > 0, "alpha is ", alpha, "; it must be positive");
    check(num_candidates >= 1, "num_candidates is ", num_candidates, "; it must be at least 1");
    const auto first_time = static_cast<float>(min_time);
    check(first_time > 0 && first_time < 1, "min_time is ", min_time,
          "; it must be between 0 and 1");
    for (const double part : {instantaneous_fraction, acting_fraction}) {
        check(part >= 0 && part <= 1, "a fraction of the rows is ", part,
              "; it must be from 0 to 1");
    }
    const LossCall call(policy, parameters, gradients, critics, obs, noise, alpha);
    const int64_t rows = call.inputs.rows;
    const RowsView a = matrix(action, "action", rows, policy.action_dim);
    const float* uniforms = dense(uniform, "uniform", {rows, 3});
    for (int64_t i = 0; i < 3 * rows; ++i) {
        check(uniforms[i] >= 0 && uniforms[i] <= 1, "uniform holds ", uniforms[i],
              "; it must be from 0 to 1");
    }
    const FlowMatchingInputs draws{a.data,
                                   a.ld,
                                   uniforms,
                                   first_time,
                                   static_cast<float>(instantaneous_fraction),
                                   static_cast<float>(1 - acting_fraction),
                                   num_candidates,
                                   parse_candidates(sampling),
                                   seed};
    FlowMatching result{};
    {
        const WithoutGil without_gil;
        result = flow_matching(call.inputs, draws, weight, call.gradients);
    }
    return py::make_tuple(result.loss, result.ess);
}

}  // namespace

void bind_policy_loss(py::module_& m) {
    py::class_<PolicySampler>(m, "PolicySampler")
        .def_static("gaussian", &gaussian_sampler, py::arg("spec"), py::arg("log_std_range"))
        .def_static("flow", &flow_sampler, py::arg("spec"), py::arg("time"), py::arg("scale"))
        .def_static("denoising", &denoising_sampler, py::arg("spec"), py::arg("time"),
                    py::arg("steps"))
        .def("sample", &py_sample, py::arg("parameters"), py::arg("obs"), py::arg("noise"));
    m.def("gaussian_loss", &py_gaussian_loss, py::arg("policy"), py::arg("parameters"),
          py::arg("gradients"), py::arg("critics"), py::arg("obs"), py::arg("noise"),
          py::arg("alpha"));
    m.def("flow_reverse_kl", &py_flow_reverse_kl, py::arg("policy"), py::arg("parameters"),
          py::arg("gradients"), py::arg("critics"), py::arg("obs"), py::arg("noise"),
          py::arg("alpha"), py::kw_only(), py::arg("weight"), py::arg("boundary_width"),
          py::arg("monotonicity_margin"), py::arg("wall_scale"));
    m.def("flow_matching", &py_flow_matching, py::arg("policy"), py::arg("parameters"),
          py::arg("gradients"), py::arg("critics"), py::arg("obs"), py::arg("action"),
          py::arg("noise"), py::arg("uniform"), py::arg("alpha"), py::kw_only(), py::arg("weight"),
          py::arg("min_time"), py::arg("instantaneous_fraction"), py::arg("acting_fraction"),
          py::arg("num_candidates"), py::arg("sampling"), py::arg("seed"));
    m.def("tanh_gaussian", &py_tanh_gaussian, py::arg("output"), py::arg("noise"),
          py::arg("log_std_range"));
    m.def("tanh_gaussian_gradient", &py_tanh_gaussian_gradient, py::arg("output"), py::arg("noise"),
          py::arg("d_action"), py::arg("d_log_prob"), py::arg("log_std_range"));
    m.def("monotonicity_gap", &py_monotonicity_gap, py::arg("transport"), py::arg("margin"));
}

}  // namespace flame
