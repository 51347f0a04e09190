// Python entry point of the fused critic updates.
#include <pybind11/stl.h>

#include <optional>
#include <utility>

#include "bindings.h"
#include "bindings_arrays.h"
#include "bindings_networks.h"
#include "critic_updates.h"

namespace flame {
namespace {

// One number per transition, a column of a wider array as well as a vector.
std::pair<const float*, int64_t> column(const py::array& a, const char* name, int64_t rows) {
    check_float32(a, name);
    const auto item = static_cast<py::ssize_t>(sizeof(float));
    check(a.ndim() == 1 && a.shape(0) == rows && a.strides(0) % item == 0, name, " has shape ",
          shape_text(a), "; it must be (", rows, ",)");
    return {static_cast<const float*>(a.data()), a.strides(0) / item};
}

py::tuple py_critic_updates(const PolicySampler& policy, const py::array& policy_parameters,
                            const MlpSpec& critics, const py::array& parameters,
                            const py::array& first_moment, const py::array& second_moment,
                            const py::array& target_parameters, const py::array& obs,
                            const py::array& action, const py::array& reward,
                            const py::array& discount, const py::array& next_obs,
                            const py::array& noise, float reward_scale, float alpha, float tau,
                            int updates, int64_t step, double learning_rate, double beta1,
                            double beta2, double epsilon, const std::optional<NetworkView>& pair) {
    check(step >= 1, "step is ", step, "; the first step is 1");
    check(updates >= 1, "updates is ", updates, "; it must be at least 1");
    check(alpha == 0 || policy.denoising.empty(),
          "a denoising policy has no density; alpha must be 0, it is ", alpha);
    check(action.ndim() == 2 && action.shape(0) >= 1, "action has shape ", shape_text(action),
          "; it must be (rows, ", policy.action_dim, ") with at least one row");
    const int64_t rows = action.shape(0);
    check(rows % updates == 0, "the ", rows, " rows have no ", updates, " equal parts");
    const int64_t count = count_of(critics);
    const PairArgument seen(pair, policy.action_dim);
    const int features = pair_columns(seen.get());
    const int obs_dim = shared_obs_dim(policy, critics, features);
    const RowsView s = matrix(obs, "obs", rows, obs_dim);
    const RowsView a = matrix(action, "action", rows, policy.action_dim);
    const RowsView next = matrix(next_obs, "next_obs", rows, obs_dim);
    const auto [rewards, reward_ld] = column(reward, "reward", rows);
    const auto [discounts, discount_ld] = column(discount, "discount", rows);
    const CriticUpdates all{&policy,
                            dense(policy_parameters, "policy_parameters", {count_of(policy.spec)}),
                            critics,
                            seen.get(),
                            count,
                            writable(parameters, "parameters", {count}),
                            writable(first_moment, "first_moment", {count}),
                            writable(second_moment, "second_moment", {count}),
                            writable(target_parameters, "target_parameters", {count}),
                            updates,
                            rows,
                            s.data,
                            s.ld,
                            a.data,
                            a.ld,
                            rewards,
                            reward_ld,
                            discounts,
                            discount_ld,
                            next.data,
                            next.ld,
                            dense(noise, "noise", {rows, policy.action_dim}),
                            reward_scale,
                            alpha,
                            tau,
                            step,
                            learning_rate,
                            beta1,
                            beta2,
                            epsilon};
    CriticUpdatesResult result{};
    {
        const WithoutGil without_gil;
        result = critic_updates(all);
    }
    return py::make_tuple(result.loss, result.q_mean);
}

}  // namespace

void bind_critic_updates(py::module_& m) {
    m.def("critic_updates", &py_critic_updates, py::arg("policy"), py::arg("policy_parameters"),
          py::arg("critics"), py::arg("parameters"), py::arg("first_moment"),
          py::arg("second_moment"), py::arg("target_parameters"), py::arg("obs"), py::arg("action"),
          py::arg("reward"), py::arg("discount"), py::arg("next_obs"), py::arg("noise"),
          py::kw_only(), py::arg("reward_scale"), py::arg("alpha"), py::arg("tau"),
          py::arg("updates"), py::arg("step"), py::arg("learning_rate"), py::arg("beta1"),
          py::arg("beta2"), py::arg("epsilon"), py::arg("pair") = py::none());
}

}  // namespace flame
