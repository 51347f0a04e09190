// The policies' losses with their gradients by the CPU kernels, each in one call: what
// flame_ext/policies/gaussian.py and flow.py write down, differentiated by hand.
#pragma once

#include <stdint.h>

#include "policy_sampler.h"

namespace flame {

// What both losses read: the policy, frozen critics, states, and the base noise of fresh samples.
struct PolicyLossInputs {
    const PolicySampler* policy;
    const float* parameters;
    MlpSpec critics;
    const float* critic_parameters;
    const PairEncoder* pair;  // what critics see beside the action, or null
    int64_t rows;
    const float* obs;  // (rows, O), rows `obs_ld` apart
    int64_t obs_ld;
    const float* noise;  // (rows, A) dense
    double alpha;
};

struct ReverseKl {
    double loss;      // E[alpha log pi - Qmin], the walls included
    double log_prob;  // mean
    double fold_rate;
};

// SAC's objective (Haarnoja et al. 2018, Eq. 7); its gradient is added to `gradients`.
ReverseKl gaussian_loss(const PolicyLossInputs& inputs, float* gradients);

// Where entropy would grow for free: outside the box and where the map folds.
struct Walls {
    float boundary_width;
    float monotonicity_margin;  // 0 for none
    float q_scale;              // the walls' weight is alpha + q_scale E|Qmin|
};

// Reverse KL through the exact density of a one-step flow; `weight` times its gradient is added.
ReverseKl flow_reverse_kl(const PolicyLossInputs& inputs, const Walls& walls, double weight,
                          float* gradients);

// Ends of the paths z = (1 - t) action + t noise (PolicyLossInputs::noise), how times are chosen
// and how candidates are drawn. A share of the pairs has r = t, another one (r, t) = (0, 1).
struct FlowMatchingInputs {
    const float* action;  // (rows, A), rows `action_ld` apart
    int64_t action_ld;
    const float* uniform;  // (rows, 3) dense, in [0, 1]: t, which kind of pair, r / t
    float min_time;
    float instantaneous_below;  // the second uniform of pairs r = t
    float acting_from;          // and of (0, 1)
    int32_t candidates;
    Candidates source;  // kRandom or kStratified
    uint64_t seed;
};

struct FlowMatching {
    double loss;
    double ess;  // mean, as a fraction of the candidates
};

// The collapsed MeanFlow loss on the Q-reweighted velocity; `weight` times its gradient is added.
FlowMatching flow_matching(const PolicyLossInputs& inputs, const FlowMatchingInputs& draws,
                           double weight, float* gradients);

}  // namespace flame
