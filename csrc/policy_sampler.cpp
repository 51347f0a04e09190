#include "policy_sampler.h"

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/workspace.h"
#include "tanh_gaussian.h"

namespace flame {

void sample_actions(const PolicySampler& p, const float* parameters, int64_t rows, const float* obs,
                    int64_t obs_ld, const float* noise, float* action, float* log_prob) {
    Workspace workspace;
    const bool density = log_prob != nullptr;
    if (!density) log_prob = workspace.floats(rows);
    if (p.steps == 0) {
        float* output = workspace.floats(rows * 2 * p.action_dim);
        kernels().mlp_forward({p.spec, parameters, rows, obs, obs_ld, output});
        tanh_gaussian({rows, p.action_dim, output, noise, p.log_std_min, p.log_std_max}, action,
                      log_prob);
        return;
    }
    FlowDensityArgs args = flow_samples(p, parameters, rows, obs, obs_ld, noise);
    args.divergence = density ? Divergence::kLogDet : Divergence::kNone;
    args.action = action;
    args.log_prob = log_prob;
    args.folded = static_cast<bool*>(workspace.bytes(rows * sizeof(bool)));
    kernels().flow_density(args);
    std::transform(action, action + rows * p.action_dim, action, into_box);
}

}  // namespace flame
