// Python entry points of the training kernels: check every argument, release the GIL, call.
#include <pybind11/stl.h>

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
    const py::gil_scoped_release release;
    kernels().mlp_forward(args);
    return output;
}

class RecordedMlp {
  public:
    RecordedMlp(const MlpSpec& spec, const py::array& parameters, const py::array& input) {
        const MlpForwardArgs args = forward_args(spec, parameters, input, output_);
        check(args.rows >= 1, "input has no rows; a recorded pass needs at least one");
        const py::gil_scoped_release release;
        tape_ = kernels().mlp_record(args, *memory_);
    }

    const Array& output() const { return output_; }

    void backward(const py::array& gradients, const py::array& d_output) const {
        const MlpBackwardArgs args{
            tape_, writable(gradients, "gradients", {tape_->parameter_count}),
            dense(d_output, "d_output", {output_.shape(0), output_.shape(1), output_.shape(2)})};
        const py::gil_scoped_release release;
        tape_->backward(args);
    }

  private:
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
        const py::gil_scoped_release release;
        kernels().q_gradient(args);
    }
    return py::make_tuple(q_min, gradient);
}

// Either `uniform` or (num_candidates, seed, stream, offset, sampling) says where candidates are.
py::tuple py_reweighted_velocity(const MlpSpec& spec, const py::array& parameters,
                                 const py::array& obs, const py::array& z, const py::array& signal,
                                 const py::array& scale, double alpha,
                                 const std::optional<py::array>& uniform, int num_candidates,
                                 uint64_t seed, uint64_t stream, uint64_t offset,
                                 const std::string& sampling, bool resample) {
    check(z.ndim() == 2 && z.shape(1) >= 1 && z.shape(1) <= kMaxActionColumns, "z has shape ",
          shape_text(z), "; it must be (states, action columns) with 1 to ", kMaxActionColumns,
          " columns");
    check(alpha > 0, "alpha is ", alpha, "; it must be positive");
    const int64_t states = z.shape(0);
    const int64_t action_dim = z.shape(1);
    const bool given = uniform.has_value();
    check(!given || uniform->ndim() == 3, "uniform must be (states, candidates, action columns)");
    const int64_t candidates = given ? uniform->shape(1) : num_candidates;
    check(candidates >= 1, "num_candidates is ", candidates, "; it must be at least 1");
    const RowsView s =
        matrix(obs, "obs", states, critic_obs_dim(spec, static_cast<int>(action_dim)));
    const float* scales = dense(scale, "scale", {states});
    for (int64_t i = 0; i < states; ++i) {
        check(scales[i] > 0, "scale[", i, "] is ", scales[i], "; it must be positive");
    }
    Array velocity({states, action_dim});
    Array ess(states);
    Array resampled({resample ? states : 0, action_dim});
    const ReweightedArgs args{
        spec,
        dense(parameters, "parameters", {count_of(spec)}),
        states,
        static_cast<int32_t>(candidates),
        static_cast<int32_t>(action_dim),
        s.data,
        s.ld,
        dense(z, "z", {states, action_dim}),
        dense(signal, "signal", {states}),
        scales,
        alpha,
        given ? Candidates::kGiven : parse_candidates(sampling),
        given ? dense(*uniform, "uniform", {states, candidates, action_dim}) : nullptr,
        seed,
        stream,
        offset,
        velocity.mutable_data(),
        ess.mutable_data(),
        resample ? resampled.mutable_data() : nullptr};
    {
        const py::gil_scoped_release release;
        kernels().reweighted_velocity(args);
    }
    if (resample) return py::make_tuple(velocity, ess, resampled);
    return py::make_tuple(velocity, ess, py::none());
}

Array py_truncated_normal(const py::array& low, const py::array& high, const py::array& uniform) {
    const int64_t n = low.size();
    Array output(n);
    const TruncatedNormalArgs args{n, dense(low, "low", {n}), dense(high, "high", {n}),
                                   dense(uniform, "uniform", {n}), output.mutable_data()};
    const py::gil_scoped_release release;
    kernels().truncated_normals(args);
    return output;
}

double py_meanflow_step(const MlpSpec& spec, const py::array& parameters,
                        const py::array& gradients, const py::array& obs, const py::array& z,
                        const py::array& r, const py::array& t, const py::array& velocity,
                        const std::optional<py::array>& tangent_velocity) {
    const int obs_dim = flow_obs_dim(spec, kTimeFeatures);
    const int64_t action_dim = outputs(spec);
    const int64_t rows = z.ndim() == 2 ? z.shape(0) : 0;
    check(rows >= 1, "z has shape ", shape_text(z), "; it must be (rows, ", action_dim,
          ") with at least one row");
    const RowsView s = matrix(obs, "obs", rows, obs_dim);
    const float* v = dense(velocity, "velocity", {rows, action_dim});
    double loss = 0.0;
    const MeanFlowStepArgs args{
        spec,
        dense(parameters, "parameters", {count_of(spec)}),
        writable(gradients, "gradients", {count_of(spec)}),
        rows,
        static_cast<int32_t>(action_dim),
        s.data,
        s.ld,
        dense(z, "z", {rows, action_dim}),
        v,
        tangent_velocity ? dense(*tangent_velocity, "tangent_velocity", {rows, action_dim}) : v,
        dense(r, "r", {rows}),
        dense(t, "t", {rows}),
        &loss};
    const py::gil_scoped_release release;
    kernels().meanflow_step(args);
    return loss;
}

// --- Flow density

struct DensityResult {
    Array action;
    Array log_prob;
    py::array_t<bool> folded;
};

// noise (states, samples, A) or, with samples = 1, (states, A).
FlowDensityArgs density_args(const MlpSpec& spec, const py::array& parameters, const py::array& obs,
                             const py::array& noise, const py::array& time, const py::array& scale,
                             const std::string& divergence, const std::optional<py::array>& probe,
                             DensityResult& result) {
    const int64_t action_dim = outputs(spec);
    check(noise.ndim() == 2 || noise.ndim() == 3, "noise has shape ", shape_text(noise),
          "; it must be (states, ", action_dim, ") or (states, samples, ", action_dim, ")");
    const int64_t states = noise.shape(0);
    const int64_t samples = noise.ndim() == 3 ? noise.shape(1) : 1;
    const auto fits = [&](const py::array& a, const char* name) {
        return noise.ndim() == 3 ? dense(a, name, {states, samples, action_dim})
                                 : dense(a, name, {states, action_dim});
    };
    check(time.ndim() == 2, "time has shape ", shape_text(time), "; it must be (steps, features)");
    const int64_t steps = time.shape(0);
    check(steps >= 1, "time has no rows; a flow has at least one step");
    const RowsView s = matrix(obs, "obs", states, flow_obs_dim(spec, time.shape(1)));
    const Divergence kind = parse_divergence(divergence);
    check((kind == Divergence::kProbe) == probe.has_value(),
          "divergence='probe' and the argument probe go together");
    std::vector<py::ssize_t> shape(noise.shape(), noise.shape() + noise.ndim());
    result.action = Array(shape);
    shape.pop_back();
    result.log_prob = Array(shape);
    result.folded = py::array_t<bool>(shape);
    return {spec,
            dense(parameters, "parameters", {count_of(spec)}),
            states,
            static_cast<int32_t>(samples),
            static_cast<int32_t>(action_dim),
            s.data,
            s.ld,
            fits(noise, "noise"),
            static_cast<int32_t>(steps),
            static_cast<int32_t>(time.shape(1)),
            dense(time, "time", {steps, time.shape(1)}),
            dense(scale, "scale", {steps}),
            kind,
            probe ? fits(*probe, "probe") : nullptr,
            result.action.mutable_data(),
            result.log_prob.mutable_data(),
            result.folded.mutable_data(),
            nullptr};
}

py::tuple py_flow_density(const MlpSpec& spec, const py::array& parameters, const py::array& obs,
                          const py::array& noise, const py::array& time, const py::array& scale,
                          const std::string& divergence, const std::optional<py::array>& probe) {
    DensityResult result;
    const FlowDensityArgs args =
        density_args(spec, parameters, obs, noise, time, scale, divergence, probe, result);
    if (args.states * args.samples > 0) {
        const py::gil_scoped_release release;
        kernels().flow_density(args);
    }
    return py::make_tuple(result.action, result.log_prob, result.folded);
}

// Owns the memory of a recorded one-step pass.
class RecordedDensity {
  public:
    RecordedDensity(const MlpSpec& spec, const py::array& parameters, const py::array& obs,
                    const py::array& noise, const py::array& time, const py::array& scale,
                    bool density) {
        check(noise.ndim() == 2 && noise.shape(0) >= 1, "noise has shape ", shape_text(noise),
              "; it must be (rows, ", outputs(spec), ") with at least one row");
        check(time.ndim() == 2 && time.shape(0) == 1, "time has shape ", shape_text(time),
              "; only one step can be recorded, so it must be (1, features)");
        FlowDensityArgs args = density_args(spec, parameters, obs, noise, time, scale,
                                            density ? "log_det" : "none", std::nullopt, result_);
        if (density) {
            const auto rows = static_cast<py::ssize_t>(args.states);
            transport_ = Array({rows, static_cast<py::ssize_t>(args.action_dim),
                                static_cast<py::ssize_t>(args.action_dim)});
            args.transport = transport_.mutable_data();
        }
        const py::gil_scoped_release release;
        tape_ = kernels().flow_record(args, *memory_);
    }

    const DensityResult& result() const { return result_; }
    const Array& transport() const { return transport_; }

    void backward(const py::array& gradients, const py::array& d_action,
                  const py::array& d_log_prob, const std::optional<py::array>& d_transport) const {
        const int64_t n = tape_->action_dim;
        const FlowBackwardArgs args{
            tape_, writable(gradients, "gradients", {tape_->parameter_count}),
            dense(d_action, "d_action", {tape_->rows, tape_->action_dim}),
            dense(d_log_prob, "d_log_prob", {tape_->rows}),
            d_transport ? dense(*d_transport, "d_transport", {tape_->rows, n, n}) : nullptr};
        const py::gil_scoped_release release;
        tape_->backward(args);
    }

  private:
    RecordMemory memory_;
    DensityResult result_;
    Array transport_;
    FlowTape* tape_ = nullptr;
};

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

Divergence parse_divergence(const std::string& name) {
    if (name == "none") return Divergence::kNone;
    if (name == "log_det") return Divergence::kLogDet;
    if (name == "trace") return Divergence::kTrace;
    check(name == "probe", "divergence is '", name,
          "'; choose one of: none, log_det, trace, probe");
    return Divergence::kProbe;
}

void bind_training(py::module_& m) {
    py::class_<MlpSpec>(m, "MlpSpec")
        .def(py::init(&make_spec), py::arg("sizes"), py::kw_only(), py::arg("members"),
             py::arg("activation"), py::arg("layer_norm"))
        .def_property_readonly("parameter_count", &count_of);
    m.def("mlp_forward", &py_mlp_forward, py::arg("spec"), py::arg("parameters"), py::arg("input"));
    py::class_<RecordedMlp>(m, "RecordedMlp")
        .def(py::init<const MlpSpec&, const py::array&, const py::array&>(), py::arg("spec"),
             py::arg("parameters"), py::arg("input"))
        .def_property_readonly("output", &RecordedMlp::output)
        .def("backward", &RecordedMlp::backward, py::arg("gradients"), py::arg("d_output"));
    m.def("twin_q", &py_twin_q, py::arg("spec"), py::arg("parameters"), py::arg("obs"),
          py::arg("actions"), py::arg("each") = false);
    m.def("critic_step", &py_critic_step, py::arg("spec"), py::arg("parameters"),
          py::arg("gradients"), py::arg("obs"), py::arg("action"), py::arg("target"));
    m.def("q_gradient", &py_q_gradient, py::arg("spec"), py::arg("parameters"), py::arg("obs"),
          py::arg("action"));
    m.def("reweighted_velocity", &py_reweighted_velocity, py::arg("spec"), py::arg("parameters"),
          py::arg("obs"), py::arg("z"), py::arg("signal"), py::arg("scale"), py::arg("alpha"),
          py::kw_only(), py::arg("uniform") = py::none(), py::arg("num_candidates") = 32,
          py::arg("seed") = 0, py::arg("stream") = 0, py::arg("offset") = 0,
          py::arg("sampling") = "stratified", py::arg("resample") = false);
    m.def("truncated_normal", &py_truncated_normal, py::arg("low"), py::arg("high"),
          py::arg("uniform"));
    m.def("meanflow_step", &py_meanflow_step, py::arg("spec"), py::arg("parameters"),
          py::arg("gradients"), py::arg("obs"), py::arg("z"), py::arg("r"), py::arg("t"),
          py::arg("velocity"), py::arg("tangent_velocity") = py::none());
    m.def("flow_density", &py_flow_density, py::arg("spec"), py::arg("parameters"), py::arg("obs"),
          py::arg("noise"), py::arg("time"), py::arg("scale"), py::arg("divergence"),
          py::arg("probe") = py::none());
    py::class_<RecordedDensity>(m, "RecordedDensity")
        .def(py::init<const MlpSpec&, const py::array&, const py::array&, const py::array&,
                      const py::array&, const py::array&, bool>(),
             py::arg("spec"), py::arg("parameters"), py::arg("obs"), py::arg("noise"),
             py::arg("time"), py::arg("scale"), py::arg("density") = true)
        .def_property_readonly("action", [](const RecordedDensity& d) { return d.result().action; })
        .def_property_readonly("log_prob",
                               [](const RecordedDensity& d) { return d.result().log_prob; })
        .def_property_readonly("folded", [](const RecordedDensity& d) { return d.result().folded; })
        .def_property_readonly("transport", &RecordedDensity::transport)
        .def("backward", &RecordedDensity::backward, py::arg("gradients"), py::arg("d_action"),
             py::arg("d_log_prob"), py::arg("d_transport") = py::none());
    m.def("adam", &py_adam, py::arg("parameters"), py::arg("gradients"), py::arg("first_moment"),
          py::arg("second_moment"), py::arg("step"), py::arg("learning_rate"), py::arg("beta1"),
          py::arg("beta2"), py::arg("epsilon"));
    m.def("soft_update", &py_soft_update, py::arg("target"), py::arg("online"), py::arg("tau"));
}

}  // namespace flame
