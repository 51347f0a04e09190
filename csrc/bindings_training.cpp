// Python entry points of the training kernels: check every argument, release the GIL, call.
#include <pybind11/stl.h>

#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "bindings.h"
#include "bindings_arrays.h"
#include "bindings_networks.h"
#include "cpu/kernels.h"
#include "cpu/record_memory.h"

namespace flame {
namespace {

using Array = py::array_t<float>;

// --- MlpSpec

MlpSpec make_spec(const std::vector<int>& sizes, int members, const std::string& activation,
                  bool layer_norm, bool bfloat16) {
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
    check(!bfloat16 || bfloat16_supported(),
          "bfloat16 products need a processor with AVX512-BF16 (instruction set in use: ",
          isa_name(isa_active()), ")");
    spec.bfloat16 = bfloat16;
    for (int i = 0; i <= layers; ++i) {
        check(sizes[i] >= 1 && sizes[i] <= kMaxWidth, "sizes[", i, "] is ", sizes[i],
              "; it must be from 1 to ", kMaxWidth);
        spec.sizes[i] = sizes[i];
    }
    return spec;
}

// --- Kernels

MlpForwardArgs forward_args(const MlpSpec& spec, const py::array& parameters,
                            const py::array& input, Array& output) {
    const RowsView x = matrix(input, "input", -1, spec.sizes[0]);
    output =
        Array({static_cast<int64_t>(spec.members), x.rows, static_cast<int64_t>(outputs(spec))});
    return {spec,   dense(parameters, "parameters", {count_of(spec)}),
            x.rows, x.data,
            x.ld,   output.mutable_data()};
}

Array py_mlp_forward(const MlpSpec& spec, const py::array& parameters, const py::array& input) {
    Array output;
    const MlpForwardArgs args = forward_args(spec, parameters, input, output);
    const WithoutGil without_gil;
    kernels(spec).mlp_forward(args);
    return output;
}

class RecordedMlp {
  public:
    RecordedMlp(const MlpSpec& spec, const py::array& parameters, const py::array& input,
                int input_columns) {
        const MlpRecordArgs args{forward_args(spec, parameters, input, output_), input_columns};
        check(input_columns >= 0 && input_columns <= spec.sizes[0], "input_columns is ",
              input_columns, "; it must be from 0 to ", spec.sizes[0]);
        const WithoutGil without_gil;
        tape_ = kernels(spec).mlp_record(args, *memory_);
    }

    const Array& output() const { return output_; }

    Array backward(const py::array& d_output, const std::optional<py::array>& gradients) const {
        Array d_input({tape_->rows, static_cast<int64_t>(tape_->input_columns)});
        const MlpBackwardArgs args{
            tape_,
            dense(d_output, "d_output", {output_.shape(0), output_.shape(1), output_.shape(2)}),
            gradients ? writable(*gradients, "gradients", {tape_->parameter_count}) : nullptr,
            tape_->input_columns > 0 ? d_input.mutable_data() : nullptr};
        const WithoutGil without_gil;
        const std::lock_guard<std::mutex> lock(in_backward_);
        tape_->backward(args);
        return d_input;
    }

  private:
    mutable std::mutex in_backward_;  // which works in the record's memory
    RecordMemory memory_;
    Array output_;
    MlpTape* tape_ = nullptr;
};

py::object py_twin_q(const MlpSpec& spec, const py::array& parameters, const py::array& obs,
                     const py::array& actions, bool each) {
    check(actions.ndim() == 3, "actions has shape ", shape_text(actions),
          "; it must be (states, candidates, action columns)");
    const int64_t states = actions.shape(0);
    const int64_t candidates = actions.shape(1);
    check(candidates <= INT32_MAX, "actions hold ", candidates, " candidates; at most ", INT32_MAX);
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
        const WithoutGil without_gil;
        kernels(spec).twin_q(args);
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
        const WithoutGil without_gil;
        kernels(spec).critic_step(args);
    }
    return py::make_tuple(loss, q_mean, q);
}

py::tuple py_q_gradient(const MlpSpec& spec, const py::array& parameters, const py::array& obs,
                        const py::array& action) {
    check(action.ndim() == 2, "action has shape ", shape_text(action),
          "; it must be (rows, columns)");
    const int64_t rows = action.shape(0);
    const int action_dim = static_cast<int>(action.shape(1));
    const RowsView s = matrix(obs, "obs", rows, critic_obs_dim(spec, action_dim));
    const RowsView a = matrix(action, "action", rows, action_dim);
    Array q_min(rows);
    Array gradient({rows, static_cast<int64_t>(action_dim)});
    const QGradientArgs args{spec,
                             dense(parameters, "parameters", {count_of(spec)}),
                             rows,
                             action_dim,
                             s.data,
                             s.ld,
                             a.data,
                             a.ld,
                             q_min.mutable_data(),
                             gradient.mutable_data()};
    if (rows > 0) {
        const WithoutGil without_gil;
        kernels(spec).q_gradient(args);
    }
    return py::make_tuple(q_min, gradient);
}

// --- Optimizer

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
    const WithoutGil without_gil;
    kernels().adam(args);
}

void py_soft_update(const py::array& target, const py::array& online, double tau) {
    check(tau >= 0 && tau <= 1, "tau is ", tau, "; it must be from 0 to 1");
    const int64_t n = target.size();
    const SoftUpdateArgs args{n, writable(target, "target", {n}), dense(online, "online", {n}),
                              static_cast<float>(tau)};
    const WithoutGil without_gil;
    kernels().soft_update(args);
}

}  // namespace

void bind_training(py::module_& m) {
    py::class_<MlpSpec>(m, "MlpSpec")
        .def(py::init(&make_spec), py::arg("sizes"), py::kw_only(), py::arg("members"),
             py::arg("activation"), py::arg("layer_norm"), py::arg("bfloat16") = false)
        .def_property_readonly("parameter_count", &count_of);
    m.def("mlp_forward", &py_mlp_forward, py::arg("spec"), py::arg("parameters"), py::arg("input"));
    py::class_<RecordedMlp>(m, "RecordedMlp")
        .def(py::init<const MlpSpec&, const py::array&, const py::array&, int>(), py::arg("spec"),
             py::arg("parameters"), py::arg("input"), py::arg("input_columns") = 0)
        .def_property_readonly("output", &RecordedMlp::output)
        .def("backward", &RecordedMlp::backward, py::arg("d_output"),
             py::arg("gradients") = py::none());
    m.def("twin_q", &py_twin_q, py::arg("spec"), py::arg("parameters"), py::arg("obs"),
          py::arg("actions"), py::arg("each") = false);
    m.def("critic_step", &py_critic_step, py::arg("spec"), py::arg("parameters"),
          py::arg("gradients"), py::arg("obs"), py::arg("action"), py::arg("target"));
    m.def("q_gradient", &py_q_gradient, py::arg("spec"), py::arg("parameters"), py::arg("obs"),
          py::arg("action"));
    m.def("adam", &py_adam, py::arg("parameters"), py::arg("gradients"), py::arg("first_moment"),
          py::arg("second_moment"), py::arg("step"), py::arg("learning_rate"), py::arg("beta1"),
          py::arg("beta2"), py::arg("epsilon"));
    m.def("soft_update", &py_soft_update, py::arg("target"), py::arg("online"), py::arg("tau"));
}

}  // namespace flame
