#include "critic_updates.h"

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/workspace.h"
#include "embeddings.h"

namespace flame {
namespace {

// The policy does not change between the updates: its actions in all next states at once.
struct NextActions {
    float* action;    // (rows, A)
    float* log_prob;  // (rows); null where the target leaves the density out
};

NextActions next_actions(const CriticUpdates& u, Workspace& workspace) {
    const NextActions next{workspace.floats(u.rows * u.policy->action_dim),
                           u.alpha != 0.0f ? workspace.floats(u.rows) : nullptr};
    sample_actions(*u.policy, u.policy_parameters, u.rows, u.next_obs, u.next_obs_ld, u.noise,
                   next.action, next.log_prob);
    return next;
}

// y = reward + gamma (1 - terminated) (Qmin'(s', a') - alpha log pi(a' | s')) of transitions
// [first, first + rows)
void td_target(const CriticUpdates& u, const NextActions& next, int64_t first, int64_t rows,
               float* target, Workspace& workspace) {
    const int action_dim = u.policy->action_dim;
    const int obs_dim = obs_columns(u.critics, action_dim, u.pair);
    const float* obs = u.next_obs + first * u.next_obs_ld;
    const SeenActions seen = seen_actions(u.pair,
                                          {rows, action_dim, next.action + first * action_dim,
                                           action_dim, obs_dim, obs, u.next_obs_ld},
                                          workspace);
    float* q_min = workspace.floats(rows);
    kernels().twin_q({u.critics, u.target_parameters, rows, 1, seen.columns, obs, u.next_obs_ld,
                      seen.data, q_min, nullptr});
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = first + i;
        const float entropy = next.log_prob ? -u.alpha * next.log_prob[at] : 0.0f;
        const float goes_on = 1.0f - u.terminated[at * u.terminated_ld];
        target[i] =
            u.reward_scale * u.reward[at * u.reward_ld] + u.gamma * goes_on * (q_min[i] + entropy);
    }
}

// Adds the update's loss and mean to the result.
void update_part(const CriticUpdates& u, const NextActions& next, int part,
                 CriticUpdatesResult& result) {
    Workspace workspace;
    const int64_t rows = u.rows / u.updates;
    const int64_t first = part * rows;
    float* target = workspace.floats(rows);
    td_target(u, next, first, rows, target, workspace);
    float* gradients = workspace.floats(u.parameter_count);
    std::fill_n(gradients, u.parameter_count, 0.0f);
    double loss[kMaxMembers];
    double q_mean[kMaxMembers];
    const float* obs = u.obs + first * u.obs_ld;
    const SeenActions seen =
        seen_actions(u.pair,
                     {rows, u.policy->action_dim, u.action + first * u.action_ld, u.action_ld,
                      obs_columns(u.critics, u.policy->action_dim, u.pair), obs, u.obs_ld},
                     workspace);
    kernels().critic_step({u.critics, u.parameters, gradients, rows, seen.columns, obs, u.obs_ld,
                           seen.data, seen.ld, target, loss, q_mean, nullptr});
    kernels().adam({u.parameter_count, u.parameters, gradients, u.first_moment, u.second_moment,
                    u.step + part, u.learning_rate, u.beta1, u.beta2, u.epsilon});
    kernels().soft_update({u.parameter_count, u.target_parameters, u.parameters, u.tau});
    for (int m = 0; m < u.critics.members; ++m) {
        result.loss += loss[m] / u.updates;
        result.q_mean += q_mean[m] / (u.critics.members * u.updates);
    }
}

}  // namespace

CriticUpdatesResult critic_updates(const CriticUpdates& u) {
    if (u.policy->is_flow() && kernels().critic_updates) return kernels().critic_updates(u);
    Workspace workspace;
    const NextActions next = next_actions(u, workspace);
    CriticUpdatesResult result{0.0, 0.0};
    for (int part = 0; part < u.updates; ++part) update_part(u, next, part, result);
    return result;
}

}  // namespace flame
