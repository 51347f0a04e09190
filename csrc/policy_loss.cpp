#include "policy_loss.h"

#include <algorithm>
#include <cmath>

#include "cpu/kernels.h"
#include "cpu/record_memory.h"
#include "embeddings.h"
#include "monotonicity.h"
#include "scalar_rules.h"
#include "tanh_gaussian.h"

namespace flame {
namespace {

int64_t action_count(const PolicyLossInputs& in) { return in.rows * in.policy->action_dim; }

struct QValues {
    float* q;         // (rows) Qmin
    float* gradient;  // (rows, A) with respect to the action
    double sum;
    double sum_of_sizes;
};

QValues evaluate_q(const PolicyLossInputs& in, const float* action, Workspace& workspace) {
    const int action_dim = in.policy->action_dim;
    const int obs_dim = obs_columns(in.critics, action_dim, in.pair);
    QValues v{workspace.floats(in.rows), workspace.floats(action_count(in)), 0.0, 0.0};
    RecordMemory memory;
    const Pairs pairs{in.rows, action_dim, action, action_dim, obs_dim, in.obs, in.obs_ld};
    const RecordedPairs recorded = record_pairs(in.pair, pairs, *memory);
    const SeenActions& seen = recorded.seen;
    float* by_seen = recorded.tape ? workspace.floats(in.rows * seen.columns) : v.gradient;
    kernels(in.critics)
        .q_gradient({in.critics, in.critic_parameters, in.rows, seen.columns, in.obs, in.obs_ld,
                     seen.data, seen.ld, v.q, by_seen});
    if (recorded.tape) pair_gradient(recorded, pairs, by_seen, v.gradient);
    for (int64_t b = 0; b < in.rows; ++b) {
        v.sum += static_cast<double>(v.q[b]);
        v.sum_of_sizes += std::fabs(static_cast<double>(v.q[b]));
    }
    return v;
}

double sum_of(const float* x, int64_t count) {
    double sum = 0.0;
    for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(x[i]);
    return sum;
}

// The walls' mean and `weight` times its gradient: adds to d_action, writes d_transport.
double add_walls(const PolicyLossInputs& in, const Walls& walls, double weight, const float* action,
                 const float* clipped, const float* transport, float* d_action, float* d_transport,
                 Workspace& workspace) {
    const auto rows = static_cast<double>(in.rows);
    const double width = static_cast<double>(walls.boundary_width);
    double sum = 0.0;
    for (int64_t i = 0; i < action_count(in); ++i) {
        const float outside = action[i] - clipped[i];
        const double slope = static_cast<double>(outside) / (width * width);
        sum += 0.5 * slope * static_cast<double>(outside);
        d_action[i] += static_cast<float>(weight / rows * slope);
    }
    if (walls.monotonicity_margin == 0.0f) return sum / rows;
    const int n = in.policy->action_dim;
    const double margin = static_cast<double>(walls.monotonicity_margin);
    float* gap = workspace.floats(in.rows);
    kernels().monotonicity_gap({in.rows, n, transport, margin, gap, d_transport});
    for (int64_t b = 0; b < in.rows; ++b) {
        const auto depth = static_cast<double>(gap[b]);
        const double capped = std::min(depth, margin);  // linear from there on
        const double slope = capped / (margin * margin);
        sum += slope * (depth - 0.5 * capped);
        const auto factor = static_cast<float>(weight / rows * slope);
        for (int64_t i = b * n * n; i < (b + 1) * n * n; ++i) d_transport[i] *= factor;
    }
    return sum / rows;
}

struct NoisedActions {
    float* z;  // (rows, A)
    float* r;  // (rows), like the two below
    float* t;
    float* signal;  // 1 - t
};

NoisedActions noised_actions(const PolicyLossInputs& in, const FlowMatchingInputs& draws,
                             Workspace& workspace) {
    const int n = in.policy->action_dim;
    const NoisedActions noised{workspace.floats(action_count(in)), workspace.floats(in.rows),
                               workspace.floats(in.rows), workspace.floats(in.rows)};
    for (int64_t b = 0; b < in.rows; ++b) {
        const float* uniform = draws.uniform + 3 * b;
        const bool acting = uniform[1] >= draws.acting_from;
        const bool instantaneous = uniform[1] < draws.instantaneous_below;
        const float drawn = draws.min_time + (1.0f - draws.min_time) * uniform[0];
        const float t = acting ? 1.0f : drawn;
        noised.t[b] = t;
        noised.r[b] = instantaneous ? t : acting ? 0.0f : drawn * uniform[2];
        noised.signal[b] = 1.0f - t;
        for (int j = 0; j < n; ++j) {
            noised.z[b * n + j] =
                noised.signal[b] * draws.action[b * draws.action_ld + j] + t * in.noise[b * n + j];
        }
    }
    return noised;
}

}  // namespace

ReverseKl gaussian_loss(const PolicyLossInputs& in, float* gradients) {
    const PolicySampler& p = *in.policy;
    const auto rows = static_cast<double>(in.rows);
    RecordMemory memory;
    Workspace workspace;
    float* output = workspace.floats(2 * action_count(in));
    MlpTape* tape = kernels(p.spec).mlp_record(
        {{p.spec, in.parameters, in.rows, in.obs, in.obs_ld, output}, 0}, *memory);
    const TanhGaussian gaussian{in.rows,  p.action_dim,  output,
                                in.noise, p.log_std_min, p.log_std_max};
    float* action = workspace.floats(action_count(in));
    float* log_prob = workspace.floats(in.rows);
    tanh_gaussian(gaussian, action, log_prob);
    const QValues q = evaluate_q(in, action, workspace);
    for (int64_t i = 0; i < action_count(in); ++i) {
        q.gradient[i] *= static_cast<float>(-1.0 / rows);
    }
    float* d_log_prob = workspace.floats(in.rows);
    std::fill_n(d_log_prob, in.rows, static_cast<float>(in.alpha / rows));
    float* d_output = workspace.floats(2 * action_count(in));
    tanh_gaussian_gradient(gaussian, q.gradient, d_log_prob, d_output);
    tape->backward({tape, d_output, gradients, nullptr});
    const double mean_log_prob = sum_of(log_prob, in.rows) / rows;
    return {in.alpha * mean_log_prob - q.sum / rows, mean_log_prob, 0.0};
}

ReverseKl flow_reverse_kl(const PolicyLossInputs& in, const Walls& walls, double weight,
                          float* gradients) {
    const PolicySampler& p = *in.policy;
    const auto rows = static_cast<double>(in.rows);
    const int64_t actions = action_count(in);
    RecordMemory memory;
    Workspace workspace;
    FlowDensityArgs args = flow_samples(p, in.parameters, in.rows, in.obs, in.obs_ld, in.noise);
    args.divergence = Divergence::kLogDet;
    args.action = workspace.floats(actions);
    args.log_prob = workspace.floats(in.rows);
    args.folded = static_cast<bool*>(workspace.bytes(in.rows * sizeof(bool)));
    args.transport = workspace.floats(actions * p.action_dim);
    FlowTape* tape = kernels(args.spec).flow_record(args, *memory);
    float* clipped = workspace.floats(actions);
    std::transform(args.action, args.action + actions, clipped, into_box);
    const QValues q = evaluate_q(in, clipped, workspace);
    // Q is flat outside the box: a clipped coordinate carries no gradient of it.
    float* d_action = q.gradient;
    for (int64_t i = 0; i < actions; ++i) {
        const float inside = clipped[i] == args.action[i] ? 1.0f : 0.0f;
        d_action[i] *= static_cast<float>(-weight / rows) * inside;
    }
    const double wall_weight =
        in.alpha + static_cast<double>(walls.q_scale) * q.sum_of_sizes / rows;
    float* d_transport =
        walls.monotonicity_margin != 0.0f ? workspace.floats(actions * p.action_dim) : nullptr;
    const double wall = add_walls(in, walls, weight * wall_weight, args.action, clipped,
                                  args.transport, d_action, d_transport, workspace);
    float* d_log_prob = workspace.floats(in.rows);
    std::fill_n(d_log_prob, in.rows, static_cast<float>(weight * in.alpha / rows));
    tape->backward({tape, gradients, d_action, d_log_prob, d_transport});
    const double mean_log_prob = sum_of(args.log_prob, in.rows) / rows;
    const auto folds = static_cast<double>(std::count(args.folded, args.folded + in.rows, true));
    return {in.alpha * mean_log_prob - q.sum / rows + wall_weight * wall, mean_log_prob,
            folds / rows};
}

FlowMatching flow_matching(const PolicyLossInputs& in, const FlowMatchingInputs& draws,
                           double weight, float* gradients) {
    const PolicySampler& p = *in.policy;
    Workspace workspace;
    const NoisedActions noised = noised_actions(in, draws, workspace);
    float* velocity = workspace.floats(action_count(in));
    float* ess = workspace.floats(in.rows);
    ReweightedArgs candidates{};
    candidates.spec = in.critics;
    candidates.parameters = in.critic_parameters;
    candidates.pair = in.pair;
    candidates.states = in.rows;
    candidates.candidates = draws.candidates;
    candidates.action_dim = p.action_dim;
    candidates.obs = in.obs;
    candidates.obs_ld = in.obs_ld;
    candidates.z = noised.z;
    candidates.signal = noised.signal;
    candidates.scale = noised.t;
    candidates.alpha = in.alpha;
    candidates.source = draws.source;
    candidates.seed = draws.seed;
    candidates.velocity = velocity;
    candidates.ess = ess;
    kernels(candidates.spec).reweighted_velocity(candidates);
    const auto count = static_cast<int64_t>(parameter_count(p.spec));
    float* by_parameters = workspace.floats(count);
    std::fill_n(by_parameters, count, 0.0f);
    FlowMatching result{0.0, sum_of(ess, in.rows) / static_cast<double>(in.rows) /
                                 static_cast<double>(draws.candidates)};
    kernels(p.spec).meanflow_step({p.spec, in.parameters, by_parameters, in.rows, p.action_dim,
                                   in.obs, in.obs_ld, noised.z, velocity, noised.r, noised.t,
                                   &result.loss});
    const auto factor = static_cast<float>(weight);
    for (int64_t i = 0; i < count; ++i) gradients[i] += factor * by_parameters[i];
    return result;
}

}  // namespace flame
