// Python entry points for tests: CUDA kernels executed on the host.
#include <cstdint>
#include <string>

#include "bindings.h"
#include "bindings_arrays.h"
#include "bindings_networks.h"
#include "check.h"
#include "cpu/kernels.h"
#include "cuda/on_host.h"

namespace flame {
namespace {

HostDevice host_device(const std::string& order, int64_t shared_bytes, bool tensor_cores) {
    check(order == "rising" || order == "falling" || order == "off", "order is '", order,
          "'; choose one of: rising, falling, off");
    check(shared_bytes > 0, "shared_bytes is ", shared_bytes, "; it must be positive");
    return {order == "falling", static_cast<size_t>(shared_bytes), tensor_cores, 1};
}

// The training kernels become the CUDA ones.
void run_cuda_on_host(const std::string& order, int64_t shared_bytes, bool tensor_cores) {
    const HostDevice device = host_device(order, shared_bytes, tensor_cores);
    replace_kernels(order == "off" ? nullptr : cuda_on_host(device));
}

py::array_t<float> py_product(const py::array& x, const py::array& w, int rows_per_warp,
                              bool tensor_cores, const std::string& order) {
    check(x.ndim() == 2 && w.ndim() == 2, "x and w must be matrices");
    check(rows_per_warp == 8 || rows_per_warp == 4 || rows_per_warp == 2 ||
              (rows_per_warp == 3 && !tensor_cores),
          "rows_per_warp is ", rows_per_warp, "; choose 8, 4, 2, or 3 without tensor cores");
    const int64_t rows = x.shape(0);
    const int64_t depth = x.shape(1);
    const int64_t columns = w.shape(0);
    const float* left = dense(x, "x", {rows, depth});
    const float* right = dense(w, "w", {columns, depth});
    py::array_t<float> y({rows, columns});
    product_on_host(left, right, static_cast<int>(rows), static_cast<int>(depth),
                    static_cast<int>(columns), rows_per_warp,
                    host_device(order, INT32_MAX, tensor_cores), y.mutable_data());
    return y;
}

py::array_t<float> py_mma(const py::array& a, const py::array& b, const py::array& d) {
    const float* start = dense(d, "d", {32, 4});
    py::array_t<float> sum({32, 4}, start);
    mma_on_host(dense(a, "a", {32, 4}), dense(b, "b", {32, 2}), sum.mutable_data());
    return sum;
}

// Acting; noise is (states, samples, A).
py::array_t<float> py_policy_act_on_host(const MlpSpec& policy, const py::array& parameters,
                                         const MlpSpec& critics, const py::array& critic_parameters,
                                         const py::array& obs, const py::array& noise,
                                         const py::array& time, const py::array& scale,
                                         const std::string& order, int64_t shared_bytes,
                                         int multiprocessors, bool tensor_cores) {
    const int64_t action_dim = outputs(policy);
    check(noise.ndim() == 3 && noise.shape(1) >= 1, "noise has shape ", shape_text(noise),
          "; it must be (states, samples, ", action_dim, ") with at least one sample");
    check(time.ndim() == 2 && time.shape(0) >= 1, "time has shape ", shape_text(time),
          "; it must be (steps, features) with at least one step");
    check(multiprocessors >= 0, "multiprocessors is ", multiprocessors,
          "; it must not be negative");
    HostDevice device = host_device(order, shared_bytes, tensor_cores);
    device.multiprocessors = multiprocessors;
    const int64_t states = noise.shape(0);
    const int64_t samples = noise.shape(1);
    const int obs_dim = flow_obs_dim(policy, time.shape(1));
    check(critic_obs_dim(critics, static_cast<int>(action_dim)) == obs_dim, "the policy takes ",
          obs_dim, " observations, the critics another number");
    const RowsView s = matrix(obs, "obs", states, obs_dim);
    py::array_t<float> action({states, action_dim});
    const PolicyActArgs args{policy,
                             dense(parameters, "parameters", {count_of(policy)}),
                             critics,
                             dense(critic_parameters, "critic_parameters", {count_of(critics)}),
                             states,
                             static_cast<int32_t>(samples),
                             static_cast<int32_t>(action_dim),
                             s.data,
                             s.ld,
                             dense(noise, "noise", {states, samples, action_dim}),
                             static_cast<int32_t>(time.shape(0)),
                             static_cast<int32_t>(time.shape(1)),
                             dense(time, "time", {time.shape(0), time.shape(1)}),
                             dense(scale, "scale", {time.shape(0)}),
                             action.mutable_data(),
                             tensor_cores};
    const WithoutGil without_gil;
    policy_act_on_host(args, device);
    return action;
}

}  // namespace

void bind_on_host(py::module_& m) {
    m.def("run_cuda_on_host", &run_cuda_on_host, py::arg("order"),
          py::arg("shared_bytes") = 227 * 1024, py::arg("tensor_cores") = false);
    m.def("product_on_host", &py_product, py::arg("x"), py::arg("w"), py::arg("rows_per_warp"),
          py::arg("tensor_cores"), py::arg("order") = "rising");
    m.def("mma_on_host", &py_mma, py::arg("a"), py::arg("b"), py::arg("d"));
    m.def("policy_act_on_host", &py_policy_act_on_host, py::arg("policy"), py::arg("parameters"),
          py::arg("critics"), py::arg("critic_parameters"), py::arg("obs"), py::arg("noise"),
          py::arg("time"), py::arg("scale"), py::kw_only(), py::arg("order"),
          py::arg("shared_bytes"), py::arg("multiprocessors"), py::arg("tensor_cores") = false);
}

}  // namespace flame
