// Python entry points of state-action embeddings.
#include <pybind11/stl.h>

#include "bindings.h"
#include "bindings_arrays.h"
#include "bindings_networks.h"
#include "embeddings.h"

namespace flame {
namespace {

StateEncoder state_encoder(const NetworkView& network, float min_scale) {
    const auto& [spec, parameters] = network;
    check(spec.members == 1, "a state encoder has one member, this spec has ", spec.members);
    check(min_scale > 0, "min_scale is ", min_scale, "; it must be positive");
    return {spec, dense(parameters, "state encoder's parameters", {count_of(spec)}), min_scale};
}

py::array_t<float> py_observe(const NetworkView& encoder, const py::array& obs, float min_scale) {
    const StateEncoder state = state_encoder(encoder, min_scale);
    const RowsView s = matrix(obs, "obs", -1, state.spec.sizes[0]);
    py::array_t<float> observed(
        {s.rows, static_cast<int64_t>(state.spec.sizes[0] + outputs(state.spec))});
    float* to = observed.mutable_data();
    const WithoutGil without_gil;
    observe({state, s.rows, s.data, s.ld, to});
    return observed;
}

double py_encoder_step(const NetworkView& state, const NetworkView& pair,
                       const py::array& state_gradients, const py::array& pair_gradients,
                       const py::array& obs, const py::array& action, const py::array& next_obs,
                       float min_scale) {
    check(action.ndim() == 2 && action.shape(0) >= 1, "action has shape ", shape_text(action),
          "; it must be (rows, columns) with at least one row");
    const int64_t rows = action.shape(0);
    const auto action_dim = static_cast<int>(action.shape(1));
    const StateEncoder encoder = state_encoder(state, min_scale);
    const PairArgument pairs(pair, action_dim);
    check(pair_columns(pairs.get()) == outputs(encoder.spec), "the state encoder has ",
          outputs(encoder.spec), " outputs, the pair encoder ", pair_columns(pairs.get()));
    const int obs_dim = encoder.spec.sizes[0];
    const RowsView s = matrix(obs, "obs", rows, obs_dim);
    const RowsView a = matrix(action, "action", rows, action_dim);
    const RowsView next = matrix(next_obs, "next_obs", rows, obs_dim);
    const EncoderStep step{
        encoder,
        *pairs.get(),
        writable(state_gradients, "state_gradients", {count_of(encoder.spec)}),
        writable(pair_gradients, "pair_gradients", {count_of(pairs.get()->spec)}),
        rows,
        s.data,
        s.ld,
        a.data,
        a.ld,
        next.data,
        next.ld};
    const WithoutGil without_gil;
    return encoder_step(step);
}

}  // namespace

void bind_embeddings(py::module_& m) {
    m.def("observe", &py_observe, py::arg("encoder"), py::arg("obs"), py::kw_only(),
          py::arg("min_scale"));
    m.def("encoder_step", &py_encoder_step, py::arg("state"), py::arg("pair"),
          py::arg("state_gradients"), py::arg("pair_gradients"), py::arg("obs"), py::arg("action"),
          py::arg("next_obs"), py::kw_only(), py::arg("min_scale"));
}

}  // namespace flame
