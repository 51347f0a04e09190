// What the bindings read from a network's shape and from names, with the checks that belong to it.
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings_arrays.h"
#include "check.h"
#include "policy_sampler.h"

namespace flame {

inline Activation parse_activation(const std::string& name) {
    if (name == "relu") return Activation::kRelu;
    if (name == "silu") return Activation::kSilu;
    check(name == "mish", "activation='", name, "' is unknown; choose one of relu, silu, mish");
    return Activation::kMish;
}

inline int64_t count_of(const MlpSpec& spec) { return static_cast<int64_t>(parameter_count(spec)); }

// Critics take [action | observation] and return one value.
inline int critic_obs_dim(const MlpSpec& spec, int action_dim) {
    check(outputs(spec) == 1, "a critic has one output, this spec has ", outputs(spec));
    const int obs_dim = spec.sizes[0] - action_dim;
    check(action_dim >= 1 && obs_dim >= 0, "actions have ", action_dim,
          " columns; the critic has only ", spec.sizes[0], " inputs (action and observation)");
    return obs_dim;
}

// A mean-velocity network maps [z (A) | observation (O) | time features] to A values.
inline int flow_obs_dim(const MlpSpec& spec, int64_t time_features) {
    const int action_dim = outputs(spec);
    check(spec.members == 1, "a policy has one member, this spec has ", spec.members);
    check(action_dim <= kMaxActionColumns, "the policy has ", action_dim, " outputs; at most ",
          kMaxActionColumns, " are supported");
    const int64_t obs_dim = spec.sizes[0] - action_dim - time_features;
    check(obs_dim >= 0, "the policy has ", spec.sizes[0], " inputs; ", action_dim,
          " action columns and ", time_features, " time features need more");
    return static_cast<int>(obs_dim);
}

// Sampling steps from dense rows (steps, 5) of p, q, m, n and clip.
inline std::vector<ActStep> act_steps(const float* rows, int64_t steps) {
    std::vector<ActStep> table;
    for (const float* row = rows; row != rows + 5 * steps; row += 5) {
        table.push_back({row[0], row[1], row[2], row[3], row[4] != 0});
    }
    return table;
}

inline int policy_obs_dim(const PolicySampler& policy) {
    const int beside = policy.steps > 0 ? policy.action_dim + policy.time_features : 0;
    return policy.spec.sizes[0] - beside;
}

// The observation's size, on which a policy and its critics agree; these see `features` columns of
// embeddings beside the action.
inline int shared_obs_dim(const PolicySampler& policy, const MlpSpec& critics, int features = 0) {
    const int obs_dim = critic_obs_dim(critics, policy.action_dim + features);
    check(features <= obs_dim, "zs are the last ", features,
          " columns of the observation, which has ", obs_dim);
    const int of_policy = policy_obs_dim(policy);
    check(of_policy == obs_dim, "the policy takes ", of_policy, " observations, the critics ",
          obs_dim);
    return obs_dim;
}

// Spec and parameters, as Python hands over networks that may be missing.
using NetworkView = std::pair<MlpSpec, pybind11::array>;

inline void check_pair_encoder(const MlpSpec& spec, int action_dim) {
    check(spec.members == 1 && spec.sizes[0] == action_dim + outputs(spec),
          "a pair encoder maps [action | zs] to as many features as zs has; with ", action_dim,
          " actions this spec has ", spec.members, " members, ", spec.sizes[0], " inputs and ",
          outputs(spec), " outputs");
}

// What critics see beside the action, checked; must outlive the call that it is handed to.
class PairArgument {
  public:
    PairArgument(const std::optional<NetworkView>& pair, int action_dim) {
        if (!pair) return;
        const MlpSpec& spec = pair->first;
        encoder_ = {spec, dense(pair->second, "pair encoder's parameters", {count_of(spec)})};
        check_pair_encoder(spec, action_dim);
    }
    const PairEncoder* get() const { return encoder_.parameters ? &encoder_ : nullptr; }

  private:
    PairEncoder encoder_{};
};

inline Candidates parse_candidates(const std::string& sampling) {
    if (sampling == "random") return Candidates::kRandom;
    check(sampling == "stratified", "sampling is '", sampling,
          "'; choose one of: stratified, random");
    return Candidates::kStratified;
}

inline Divergence parse_divergence(const std::string& name) {
    if (name == "none") return Divergence::kNone;
    if (name == "log_det") return Divergence::kLogDet;
    if (name == "trace") return Divergence::kTrace;
    check(name == "probe", "divergence is '", name,
          "'; choose one of: none, log_det, trace, probe");
    return Divergence::kProbe;
}

}  // namespace flame
