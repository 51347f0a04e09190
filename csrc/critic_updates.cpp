#include "critic_updates.h"

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/workspace.h"
#include "embeddings.h"
#include "scalar_rules.h"

namespace flame {
namespace {

// What no update changes, for the transitions of all of them at once.
struct Transitions {
    const float* log_prob;  // (rows) of the policy's next actions; null where no target needs it
    SeenActions next;       // those actions
    SeenActions taken;
};

Transitions prepare(const CriticUpdates& u, Workspace& workspace) {
    const int n = u.policy->action_dim;
    const int obs_dim = obs_columns(u.critics, n, u.pair);
    float* action = workspace.floats(u.rows * n);
    float* log_prob = u.alpha != 0.0f ? workspace.floats(u.rows) : nullptr;
    sample_actions(*u.policy, u.policy_parameters, u.rows, u.next_obs, u.next_obs_ld, u.noise,
                   action, log_prob);
    const Pairs next{u.rows, n, action, n, obs_dim, u.next_obs, u.next_obs_ld};
    const Pairs taken{u.rows, n, u.action, u.action_ld, obs_dim, u.obs, u.obs_ld};
    return {log_prob, seen_actions(u.pair, next, workspace),
            seen_actions(u.pair, taken, workspace)};
}

// y = reward + discount (Qmin'(s', a') - alpha log pi(a' | s')) of transitions
// [first, first + rows)
void td_targets(const CriticUpdates& u, const Transitions& all, int64_t first, int64_t rows,
                float* target, Workspace& workspace) {
    float* q_min = workspace.floats(rows);
    kernels(u.critics).twin_q({u.critics, u.target_parameters, rows, 1, all.next.columns,
                               u.next_obs + first * u.next_obs_ld, u.next_obs_ld,
                               all.next.data + first * all.next.ld, q_min, nullptr});
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = first + i;
        const float entropy = all.log_prob ? -u.alpha * all.log_prob[at] : 0.0f;
        target[i] = td_target(u.reward_scale * u.reward[at * u.reward_ld],
                              u.discount[at * u.discount_ld], q_min[i], entropy);
    }
}

// Adds the update's loss and mean to the result.
void update_part(const CriticUpdates& u, const Transitions& all, int part,
                 CriticUpdatesResult& result) {
    Workspace workspace;
    const int64_t rows = u.rows / u.updates;
    const int64_t first = part * rows;
    float* target = workspace.floats(rows);
    td_targets(u, all, first, rows, target, workspace);
    float* gradients = workspace.floats(u.parameter_count);
    std::fill_n(gradients, u.parameter_count, 0.0f);
    double loss[kMaxMembers];
    double q_mean[kMaxMembers];
    const SeenActions& taken = all.taken;
    kernels(u.critics).critic_step(
        {u.critics, u.parameters, gradients, rows, taken.columns, u.obs + first * u.obs_ld,
         u.obs_ld, taken.data + first * taken.ld, taken.ld, target, loss, q_mean, nullptr});
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
    const Transitions all = prepare(u, workspace);
    CriticUpdatesResult result{0.0, 0.0};
    for (int part = 0; part < u.updates; ++part) update_part(u, all, part, result);
    return result;
}

}  // namespace flame
