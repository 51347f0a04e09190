#include "critic_update.h"

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/workspace.h"

namespace flame {
namespace {

// y = reward + gamma (1 - terminated) (Qmin'(s', a') - alpha log pi(a' | s'))
void td_target(const CriticUpdate& u, float* target, Workspace& workspace) {
    const int action_dim = u.policy->action_dim;
    float* action = workspace.floats(u.rows * action_dim);
    float* log_prob = workspace.floats(u.rows);
    float* q_min = workspace.floats(u.rows);
    sample_actions(*u.policy, u.policy_parameters, u.rows, u.next_obs, u.next_obs_ld, u.noise,
                   action, u.alpha != 0.0f ? log_prob : nullptr);
    kernels().twin_q({u.critics, u.target_parameters, u.rows, 1, action_dim, u.next_obs,
                      u.next_obs_ld, action, q_min, nullptr});
    for (int64_t i = 0; i < u.rows; ++i) {
        const float entropy = u.alpha != 0.0f ? -u.alpha * log_prob[i] : 0.0f;
        const float goes_on = 1.0f - u.terminated[i * u.terminated_ld];
        target[i] =
            u.reward_scale * u.reward[i * u.reward_ld] + u.gamma * goes_on * (q_min[i] + entropy);
    }
}

}  // namespace

CriticUpdateResult critic_update(const CriticUpdate& u) {
    Workspace workspace;
    float* target = workspace.floats(u.rows);
    td_target(u, target, workspace);
    float* gradients = workspace.floats(u.parameter_count);
    std::fill_n(gradients, u.parameter_count, 0.0f);
    double loss[kMaxMembers];
    double q_mean[kMaxMembers];
    kernels().critic_step({u.critics, u.parameters, gradients, u.rows, u.policy->action_dim, u.obs,
                           u.obs_ld, u.action, u.action_ld, target, loss, q_mean, nullptr});
    kernels().adam({u.parameter_count, u.parameters, gradients, u.first_moment, u.second_moment,
                    u.step, u.learning_rate, u.beta1, u.beta2, u.epsilon});
    kernels().soft_update({u.parameter_count, u.target_parameters, u.parameters, u.tau});
    CriticUpdateResult result{0.0, 0.0};
    for (int m = 0; m < u.critics.members; ++m) {
        result.loss += loss[m];
        result.q_mean += q_mean[m] / u.critics.members;
    }
    return result;
}

}  // namespace flame
