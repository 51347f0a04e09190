#include "policy_sampler.h"

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/workspace.h"
#include "scalar_rules.h"
#include "tanh_gaussian.h"

namespace flame {
namespace {

ActStep step_of(const PolicySampler& p, int i) {
    return p.is_flow() ? ActStep{1.0f, p.scale[i], 1.0f, 0.0f, false} : p.denoising[i];
}

// Steps without a density: plain forward passes, which read the weights as they lie where rows are
// few. Results are not yet in the box.
void take_steps(const PolicySampler& p, const float* parameters, int64_t rows, const float* obs,
                int64_t obs_ld, const float* noise, float* action, Workspace& workspace) {
    const int n = p.action_dim;
    const int in = p.spec.sizes[0];
    const int obs_dim = in - n - p.time_features;
    float* input = workspace.floats(rows * in);  // [z | observation | time]
    for (int64_t b = 0; b < rows; ++b) {
        float* to = std::copy_n(noise + b * n, n, input + b * in);
        std::copy_n(obs + b * obs_ld, obs_dim, to);
    }
    for (int i = 0; i < p.steps; ++i) {
        const float* time = p.time.data() + i * p.time_features;
        for (int64_t b = 0; b < rows; ++b)
            std::copy_n(time, p.time_features, input + b * in + n + obs_dim);
        kernels(p.spec).mlp_forward({p.spec, parameters, rows, input, in, action});
        const ActStep s = step_of(p, i);
        for (int64_t b = 0; b < rows; ++b) {
            for (int j = 0; j < n; ++j) {
                float& z = input[b * in + j];
                float& a = action[b * n + j];
                a = z = after_step(s, z, a);
            }
        }
    }
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
        kernels(p.spec).mlp_forward({p.spec, parameters, rows, obs, obs_ld, output});
        tanh_gaussian({rows, p.action_dim, output, noise, p.log_std_min, p.log_std_max}, action,
                      log_prob);
        return;
    }
    if (!density && (p.steps == 1 || !p.is_flow())) {
        take_steps(p, parameters, rows, obs, obs_ld, noise, action, workspace);
    } else {
        FlowDensityArgs args = flow_samples(p, parameters, rows, obs, obs_ld, noise);
        args.divergence = density ? Divergence::kLogDet : Divergence::kNone;
        args.action = action;
        args.log_prob = log_prob;
        args.folded = static_cast<bool*>(workspace.bytes(rows * sizeof(bool)));
        kernels(p.spec).flow_density(args);
    }
    std::transform(action, action + rows * p.action_dim, action, into_box);
}

}  // namespace flame
