// Python entry points of what is a flow's own: reweighted velocity, MeanFlow step, density.
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

// Either `uniform` or (num_candidates, seed, stream, offset, sampling) says where candidates are.
py::tuple py_reweighted_velocity(const MlpSpec& spec, const py::array& parameters,
                                 const py::array& obs, const py::array& z, const py::array& signal,
                                 const py::array& scale, double alpha,
                                 const std::optional<py::array>& uniform, int num_candidates,
                                 uint64_t seed, uint64_t stream, uint64_t offset,
                                 const std::string& sampling) {
    check(z.ndim() == 2 && z.shape(1) >= 1 && z.shape(1) <= kMaxActionColumns, "z has shape ",
          shape_text(z), "; it must be (states, action columns) with 1 to ", kMaxActionColumns,
          " columns");
    check(alpha > 0, "alpha is ", alpha, "; it must be positive");
    const int64_t states = z.shape(0);
    const int64_t action_dim = z.shape(1);
    const bool given = uniform.has_value();
    check(!given || uniform->ndim() == 3, "uniform must be (states, candidates, action columns)");
    const int64_t candidates = given ? uniform->shape(1) : num_candidates;
    check(candidates >= 1 && candidates <= INT32_MAX, "num_candidates is ", candidates,
          "; it must be from 1 to ", INT32_MAX);
    const RowsView s =
        matrix(obs, "obs", states, critic_obs_dim(spec, static_cast<int>(action_dim)));
    const float* scales = dense(scale, "scale", {states});
    for (int64_t i = 0; i < states; ++i) {
        check(scales[i] > 0, "scale[", i, "] is ", scales[i], "; it must be positive");
    }
    Array velocity({states, action_dim});
    Array ess(states);
    const ReweightedArgs args{
        spec,
        dense(parameters, "parameters", {count_of(spec)}),
        nullptr,
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
        ess.mutable_data()};
    {
        const WithoutGil without_gil;
        kernels(spec).reweighted_velocity(args);
    }
    return py::make_tuple(velocity, ess);
}

Array py_truncated_normal(const py::array& low, const py::array& high, const py::array& uniform) {
    const int64_t n = low.size();
    Array output(n);
    const TruncatedNormalArgs args{n, dense(low, "low", {n}), dense(high, "high", {n}),
                                   dense(uniform, "uniform", {n}), output.mutable_data()};
    const WithoutGil without_gil;
    kernels().truncated_normals(args);
    return output;
}

double py_meanflow_step(const MlpSpec& spec, const py::array& parameters,
                        const py::array& gradients, const py::array& obs, const py::array& z,
                        const py::array& r, const py::array& t, const py::array& velocity) {
    const int obs_dim = flow_obs_dim(spec, kTimeFeatures);
    const int64_t action_dim = outputs(spec);
    const int64_t rows = z.ndim() == 2 ? z.shape(0) : 0;
    check(rows >= 1, "z has shape ", shape_text(z), "; it must be (rows, ", action_dim,
          ") with at least one row");
    const RowsView s = matrix(obs, "obs", rows, obs_dim);
    double loss = 0.0;
    const MeanFlowStepArgs args{spec,
                                dense(parameters, "parameters", {count_of(spec)}),
                                writable(gradients, "gradients", {count_of(spec)}),
                                rows,
                                static_cast<int32_t>(action_dim),
                                s.data,
                                s.ld,
                                dense(z, "z", {rows, action_dim}),
                                dense(velocity, "velocity", {rows, action_dim}),
                                dense(r, "r", {rows}),
                                dense(t, "t", {rows}),
                                &loss};
    const WithoutGil without_gil;
    kernels(spec).meanflow_step(args);
    return loss;
}

// --- Density

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
        const WithoutGil without_gil;
        kernels(spec).flow_density(args);
    }
    return py::make_tuple(result.action, result.log_prob, result.folded);
}

// Owns the memory of a recorded one-step pass.
class RecordedDensity {
  public:
    RecordedDensity(const MlpSpec& spec, const py::array& parameters, const py::array& obs,
                    const py::array& noise, const py::array& time, const py::array& scale) {
        check(noise.ndim() == 2 && noise.shape(0) >= 1, "noise has shape ", shape_text(noise),
              "; it must be (rows, ", outputs(spec), ") with at least one row");
        check(time.ndim() == 2 && time.shape(0) == 1, "time has shape ", shape_text(time),
              "; only one step can be recorded, so it must be (1, features)");
        FlowDensityArgs args = density_args(spec, parameters, obs, noise, time, scale, "log_det",
                                            std::nullopt, result_);
        const auto n = static_cast<py::ssize_t>(args.action_dim);
        transport_ = Array({static_cast<py::ssize_t>(args.states), n, n});
        args.transport = transport_.mutable_data();
        const WithoutGil without_gil;
        tape_ = kernels(spec).flow_record(args, *memory_);
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
        const WithoutGil without_gil;
        const std::lock_guard<std::mutex> lock(in_backward_);
        tape_->backward(args);
    }

  private:
    mutable std::mutex in_backward_;  // which works in the record's memory
    RecordMemory memory_;
    DensityResult result_;
    Array transport_;
    FlowTape* tape_ = nullptr;
};

}  // namespace

void bind_flow(py::module_& m) {
    m.def("reweighted_velocity", &py_reweighted_velocity, py::arg("spec"), py::arg("parameters"),
          py::arg("obs"), py::arg("z"), py::arg("signal"), py::arg("scale"), py::arg("alpha"),
          py::kw_only(), py::arg("uniform") = py::none(), py::arg("num_candidates") = 32,
          py::arg("seed") = 0, py::arg("stream") = 0, py::arg("offset") = 0,
          py::arg("sampling") = "stratified");
    m.def("truncated_normal", &py_truncated_normal, py::arg("low"), py::arg("high"),
          py::arg("uniform"));
    m.def("meanflow_step", &py_meanflow_step, py::arg("spec"), py::arg("parameters"),
          py::arg("gradients"), py::arg("obs"), py::arg("z"), py::arg("r"), py::arg("t"),
          py::arg("velocity"));
    m.def("flow_density", &py_flow_density, py::arg("spec"), py::arg("parameters"), py::arg("obs"),
          py::arg("noise"), py::arg("time"), py::arg("scale"), py::arg("divergence"),
          py::arg("probe") = py::none());
    py::class_<RecordedDensity>(m, "RecordedDensity")
        .def(py::init<const MlpSpec&, const py::array&, const py::array&, const py::array&,
                      const py::array&, const py::array&>(),
             py::arg("spec"), py::arg("parameters"), py::arg("obs"), py::arg("noise"),
             py::arg("time"), py::arg("scale"))
        .def_property_readonly("action", [](const RecordedDensity& d) { return d.result().action; })
        .def_property_readonly("log_prob",
                               [](const RecordedDensity& d) { return d.result().log_prob; })
        .def_property_readonly("folded", [](const RecordedDensity& d) { return d.result().folded; })
        .def_property_readonly("transport", &RecordedDensity::transport)
        .def("backward", &RecordedDensity::backward, py::arg("gradients"), py::arg("d_action"),
             py::arg("d_log_prob"), py::arg("d_transport") = py::none());
}

}  // namespace flame
