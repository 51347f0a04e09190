#include "policy_sampler.h"

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/workspace.h"
#include "tanh_gaussian.h"

namespace flame {
namespace {

// One step along the flow without its density: a plain forward pass, which reads the weights as
// they lie where rows are few.
void step_along_flow(const PolicySampler& p, const float* parameters, int64_t rows,
                     const float* obs, int64_t obs_ld, const float* noise, float* action,
                     Workspace& workspace) {
    const int n = p.action_dim;
    const int in = p.spec.sizes[0];
    const int obs_dim = in - n - p.time_features;
    float* input = workspace.floats(rows * in);
    for (int64_t b = 0; b < rows; ++b) {
        float* to = std::copy_n(noise + b * n, n, input + b * in);
        to = std::copy_n(obs + b * obs_ld, obs_dim, to);
        std::copy(p.time.begin(), p.time.end(), to);
    }
    kernels().mlp_forward({p.spec, parameters, rows, input, in, action});
    for (int64_t i = 0; i < rows * n; ++i) action[i] = into_box(noise[i] + p.scale[0] * action[i]);
}

}  // namespace

void sample_actions(const PolicySampler& p, const float* parameters, int64_t rows, const float* obs,
                    int64_t obs_ld, const float* noise, float* action, float* log_prob) {
    if (rows == 0) return;
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
    if (!density && p.steps == 1) {
        step_along_flow(p, parameters, rows, obs, obs_ld, noise, action, workspace);
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
