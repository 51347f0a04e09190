// Whole updates of soft critics by the CPU kernels: the policy's next actions, the TD target, the
// critics' gradient and Adam step, and the targets' exponential average. At the small batches that
// learn fastest the calls between these pieces would cost as much as the products inside.
#pragma once

#include <stdint.h>

#include "policy_sampler.h"

namespace flame {

struct CriticUpdates {
    const PolicySampler* policy;
    const float* policy_parameters;
    MlpSpec critics;
    const PairEncoder* pair;  // what critics and targets see beside the action, or null
    int64_t parameter_count;
    float* parameters;
    float* first_moment;
    float* second_moment;
    float* target_parameters;
    int updates;
    int64_t rows;      // of all updates together, each of which takes its part in order
    const float* obs;  // (rows, O), rows `obs_ld` apart
    int64_t obs_ld;
    const float* action;  // (rows, A)
    int64_t action_ld;
    const float* reward;  // (rows), entries `reward_ld` apart
    int64_t reward_ld;
    const float* discount;  // (rows), gamma, 0 where the episode ended
    int64_t discount_ld;
    const float* next_obs;  // (rows, O)
    int64_t next_obs_ld;
    const float* noise;  // (rows, A) dense, of the next actions
    float reward_scale;
    float alpha;  // temperature of the target's entropy; 0 leaves the density out
    float tau;
    int64_t step;  // of Adam in the first update, from 1
    double learning_rate;
    double beta1;
    double beta2;
    double epsilon;
};

// Means over the updates.
struct CriticUpdatesResult {
    double loss;    // mean squared error, summed over the members
    double q_mean;  // over members and rows
};

CriticUpdatesResult critic_updates(const CriticUpdates& updates);

}  // namespace flame
