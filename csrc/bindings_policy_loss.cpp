// Python entry points of what the policies' losses take beside networks: the tanh Gaussian and the
// wall against folding.
#include <pybind11/stl.h>

#include <utility>

#include "bindings.h"
#include "bindings_arrays.h"
#include "monotonicity.h"
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
        const py::gil_scoped_release release;
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
    const py::gil_scoped_release release;
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
        const py::gil_scoped_release release;
        monotonicity_gap(rows, static_cast<int>(n), matrices, margin, gaps, gradients);
    }
    return py::make_tuple(gap, gradient);
}

}  // namespace

void bind_policy_loss(py::module_& m) {
    m.def("tanh_gaussian", &py_tanh_gaussian, py::arg("output"), py::arg("noise"),
          py::arg("log_std_range"));
    m.def("tanh_gaussian_gradient", &py_tanh_gaussian_gradient, py::arg("output"), py::arg("noise"),
          py::arg("d_action"), py::arg("d_log_prob"), py::arg("log_std_range"));
    m.def("monotonicity_gap", &py_monotonicity_gap, py::arg("transport"), py::arg("margin"));
}

}  // namespace flame
