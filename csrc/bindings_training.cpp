// Python entry points of the training kernels: check every argument, release the GIL, call.
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "bindings.h"
#include "bindings_arrays.h"
#include "cpu/kernels.h"

namespace flame {
namespace {

using Array = py::array_t<float>;

// --- MlpSpec
// --------------------------------------------------------------------------------------

Activation parse_activation(const std::string& name) {
    if (name == "relu") return Activation::kRelu;
    if (name == "silu") return Activation::kSilu;
    check(name == "mish", "activation is '", name, "'; choose one of: relu, silu, mish");
    return Activation::kMish;
}

MlpSpec make_spec(const std::vector<int>& sizes, int members, const std::string& activation,
                  bool layer_norm) {
    const int layers = static_cast<int>(sizes.size()) - 1;
    check(layers >= 1 && layers <= kMaxLayers, "sizes has ", sizes.size(),
          " entries; it must have from 2 to ", kMaxLayers + 1, " (inputs, hidden widths, outputs)");
    check(members >= 1 && members <= kMaxMembers, "members is ", members, "; it must be from 1 to ",
          kMaxMembers);
    MlpSpec spec{};
    spec.members = members;
    spec.num_layers = layers;
    spec.activation = parse_activation(activation);
    spec.layer_norm = layer_norm;
    for (int i = 0; i <= layers; ++i) {
        check(sizes[i] >= 1 && sizes[i] <= kMaxWidth, "sizes[", i, "] is ", sizes[i],
              "; it must be from 1 to ", kMaxWidth);
        spec.sizes[i] = sizes[i];
    }
    return spec;
}

int64_t count_of(const MlpSpec& spec) { return static_cast<int64_t>(parameter_count(spec)); }

int outputs(const MlpSpec& spec) { return spec.sizes[spec.num_layers]; }

// Critics take [action | observation] and return one value.
int critic_obs_dim(const MlpSpec& spec, int action_dim) {
    check(outputs(spec) == 1, "a critic has one output, this spec has ", outputs(spec));
    const int obs_dim = spec.sizes[0] - action_dim;
    check(action_dim >= 1 && obs_dim >= 0, "actions have ", action_dim,
          " columns; the critic has only ", spec.sizes[0], " inputs (action and observation)");
    return obs_dim;
}

// --- Kernels
// --------------------------------------------------------------------------------------

Array py_mlp_forward(const MlpSpec& spec, const py::array& parameters, const py::array& input) {
    const RowsView x = matrix(input, "input", -1, spec.sizes[0]);
    Array output({static_cast<int64_t>(spec.members), x.rows, static_cast<int64_t>(outputs(spec))});
    const MlpForwardArgs args{spec,   dense(parameters, "parameters", {count_of(spec)}),
                              x.rows, x.data,
                              x.ld,   output.mutable_data()};
    const py::gil_scoped_release release;
    kernels().mlp_forward(args);
    return output;
}

py::object py_twin_q(const MlpSpec& spec, const py::array& parameters, const py::array& obs,
                     const py::array& actions, bool each) {
    check(actions.ndim() == 3, "actions has shape ", shape_text(actions),
          "; it must be (states, candidates, action columns)");
    const int64_t states = actions.shape(0);
    const int64_t candidates = actions.shape(1);
    const int action_dim = static_cast<int>(actions.shape(2));
    const RowsView s = matrix(obs, "obs", states, critic_obs_dim(spec, action_dim));
    Array q_min({states, candidates});
    Array q_each({each ? static_cast<int64_t>(spec.members) : 0, states, candidates});
    const TwinQArgs args{spec,
                         dense(parameters, "parameters", {count_of(spec)}),
                         states,
                         static_cast<int32_t>(candidates),
                         action_dim,
                         s.data,
                         s.ld,
                         dense(actions, "actions", {states, candidates, action_dim}),
                         q_min.mutable_data(),
                         each ? q_each.mutable_data() : nullptr};
    {
        const py::gil_scoped_release release;
        kernels().twin_q(args);
    }
    if (each) return py::make_tuple(q_min, q_each);
    return py::object(std::move(q_min));
}

py::tuple py_critic_step(const MlpSpec& spec, const py::array& parameters,
                         const py::array& gradients, const py::array& obs, const py::array& action,
                         const py::array& target) {
    check(action.ndim() == 2 && action.shape(0) >= 1, "action has shape ", shape_text(action),
          "; it must be (rows, action columns) with at least one row");
    const int64_t rows = action.shape(0);
    const int action_dim = static_cast<int>(action.shape(1));
    const RowsView s = matrix(obs, "obs", rows, critic_obs_dim(spec, action_dim));
    const RowsView a = matrix(action, "action", rows, action_dim);
    std::vector<double> loss(spec.members);
    std::vector<double> q_mean(spec.members);
    Array q({static_cast<int64_t>(spec.members), rows});
    const CriticStepArgs args{spec,
                              dense(parameters, "parameters", {count_of(spec)}),
                              writable(gradients, "gradients", {count_of(spec)}),
                              rows,
                              action_dim,
                              s.data,
                              s.ld,
                              a.data,
                              a.ld,
                              dense(target, "target", {rows}),
                              loss.data(),
                              q_mean.data(),
                              q.mutable_data()};
    {
        const py::gil_scoped_release release;
        kernels().critic_step(args);
    }
    return py::make_tuple(loss, q_mean, q);
}

void py_adam(const py::array& parameters, const py::array& gradients, const py::array& first_moment,
             const py::array& second_moment, int64_t step, double learning_rate, double beta1,
             double beta2, double epsilon) {
    check(step >= 1, "step is ", step, "; the first step is 1");
    const int64_t n = parameters.size();
    const AdamArgs args{n,
                        writable(parameters, "parameters", {n}),
                        dense(gradients, "gradients", {n}),
                        writable(first_moment, "first_moment", {n}),
                        writable(second_moment, "second_moment", {n}),
                        step,
                        learning_rate,
                        beta1,
                        beta2,
                        epsilon};
    const py::gil_scoped_release release;
    kernels().adam(args);
}

void py_soft_update(const py::array& target, const py::array& online, double tau) {
    check(tau >= 0 && tau <= 1, "tau is ", tau, "; it must be from 0 to 1");
    const int64_t n = target.size();
    const SoftUpdateArgs args{n, writable(target, "target", {n}), dense(online, "online", {n}),
                              static_cast<float>(tau)};
    const py::gil_scoped_release release;
    kernels().soft_update(args);
}

}  // namespace

void bind_training(py::module_& m) {
    py::class_<MlpSpec>(m, "MlpSpec")
        .def(py::init(&make_spec), py::arg("sizes"), py::kw_only(), py::arg("members"),
             py::arg("activation"), py::arg("layer_norm"))
        .def_property_readonly("parameter_count", &count_of);
    m.def("mlp_forward", &py_mlp_forward, py::arg("spec"), py::arg("parameters"), py::arg("input"));
    m.def("twin_q", &py_twin_q, py::arg("spec"), py::arg("parameters"), py::arg("obs"),
          py::arg("actions"), py::arg("each") = false);
    m.def("critic_step", &py_critic_step, py::arg("spec"), py::arg("parameters"),
          py::arg("gradients"), py::arg("obs"), py::arg("action"), py::arg("target"));
    m.def("adam", &py_adam, py::arg("parameters"), py::arg("gradients"), py::arg("first_moment"),
          py::arg("second_moment"), py::arg("step"), py::arg("learning_rate"), py::arg("beta1"),
          py::arg("beta2"), py::arg("epsilon"));
    m.def("soft_update", &py_soft_update, py::arg("target"), py::arg("online"), py::arg("tau"));
}

}  // namespace flame
