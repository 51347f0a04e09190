// Whole updates of soft critics in one sequence of launches: a flow's next actions in all next
// states, with embeddings what critics see of all actions, then for each update its TD target, the
// critics' gradient, Adam and the targets' average.
//
// All pointers of the updates are device memory of the caller, and so are the sampler's tables,
// which replace those inside `policy`, and alpha. The schedule has Adam's rate and step. loss,
// q_mean (updates, members). Workspace: next actions, what critics see of actions, target, gradient
// and that of the operations, the latter once for all updates.
//
// `operations` runs the kernels of other files and knows their workspaces: run(args), bytes(args).
//
// Ten launches per update, six before the first one with embeddings. Four updates of 64
// transitions, 23 -> 2 x 256 -> 1: 0.34 GFLOP, floor 5 us at 67 TFLOP/s; launches in a graph take
// about 1.5 us each, so that latency decides.
#pragma once

#include "critic_updates.h"
#include "cuda/best_action.h"
#include "cuda/elements.h"
#include "cuda/seen_actions.h"
#include "cuda/training.h"
#include "policy_sampler.h"
#include "scalar_rules.h"

namespace flame::FLAME_ISA {

struct IntoBox {
    static constexpr const char* kName = "into_box";
    float* action;

    FLAME_BODY void operator()(int64_t i) const { action[i] = into_box(action[i]); }
};

struct SetZero {
    static constexpr const char* kName = "set_zero";
    float* x;

    FLAME_BODY void operator()(int64_t i) const { x[i] = 0.0f; }
};

// y = reward + discount (Qmin'(s', a') - alpha log pi(a' | s'))
struct TdTarget {
    static constexpr const char* kName = "td_target";
    const float* q_min;
    const float* log_prob;  // null: without the entropy
    const float* reward;
    int64_t reward_ld;
    const float* discount;
    int64_t discount_ld;
    float reward_scale;
    const double* alpha;  // with log_prob
    float* target;

    FLAME_BODY void operator()(int64_t i) const {
        const float entropy =
            log_prob != nullptr ? -static_cast<float>(*alpha) * log_prob[i] : 0.0f;
        target[i] = td_target(reward_scale * reward[i * reward_ld], discount[i * discount_ld],
                              q_min[i], entropy);
    }
};

struct NextActions {
    float* action;    // (rows, A)
    float* log_prob;  // (rows)
    bool* folded;     // (rows)
};

// What no update changes, for the transitions of all of them at once.
struct Transitions {
    NextActions next;
    SeenPairs next_pairs;
    SeenPairs taken_pairs;
};

static inline Transitions carve_transitions(const CriticUpdates& u, Carver& memory) {
    const auto rows = static_cast<size_t>(u.rows);
    const int n = u.policy->action_dim;
    const int obs_dim = obs_columns(u.critics, n, u.pair);
    const NextActions next{memory.floats(rows * n), memory.floats(rows), memory.array<bool>(rows)};
    const Pairs next_pairs{u.rows, n, next.action, n, obs_dim, u.next_obs, u.next_obs_ld};
    const Pairs taken_pairs{u.rows, n, u.action, u.action_ld, obs_dim, u.obs, u.obs_ld};
    return {next, carve_seen_pairs(u.pair, next_pairs, memory),
            carve_seen_pairs(u.pair, taken_pairs, memory)};
}

template <typename Operations>
static inline void next_actions(const Operations& operations, const CudaCriticUpdates& c,
                                const NextActions& next) {
    const CriticUpdates& u = c.updates;
    FlowDensityArgs args =
        flow_samples(*u.policy, u.policy_parameters, u.rows, u.next_obs, u.next_obs_ld, u.noise);
    args.time = c.time;
    args.scale = c.scale;
    args.divergence = c.alpha != nullptr ? Divergence::kLogDet : Divergence::kNone;
    args.action = next.action;
    args.log_prob = next.log_prob;
    args.folded = next.folded;
    operations.run(args);
    for_elements(operations.launch, u.rows * u.policy->action_dim, IntoBox{next.action});
}

// One update's arguments and memory.
struct UpdatePart {
    TwinQArgs value;
    TdTarget target;
    CriticStepArgs step;
    void* value_memory;
    void* step_memory;
};

template <typename Operations>
static inline UpdatePart make_part(const Operations& operations, const CudaCriticUpdates& c,
                                   const Transitions& all, int part, Carver& memory) {
    const CriticUpdates& u = c.updates;
    const int64_t rows = u.rows / u.updates;
    const int64_t first = part * rows;
    const SeenActions& next = all.next_pairs.seen;
    const SeenActions& taken = all.taken_pairs.seen;
    float* q_min = memory.floats(rows);
    float* target = memory.floats(rows);
    float* gradients = memory.floats(u.parameter_count);
    const int64_t outcome = static_cast<int64_t>(part) * u.critics.members;
    UpdatePart p{
        {u.critics, u.target_parameters, rows, 1, next.columns, u.next_obs + first * u.next_obs_ld,
         u.next_obs_ld, next.data + first * next.ld, q_min, nullptr},
        {q_min, c.alpha != nullptr ? all.next.log_prob + first : nullptr,
         u.reward + first * u.reward_ld, u.reward_ld, u.discount + first * u.discount_ld,
         u.discount_ld, u.reward_scale, c.alpha, target},
        {u.critics, u.parameters, gradients, rows, taken.columns, u.obs + first * u.obs_ld,
         u.obs_ld, taken.data + first * taken.ld, taken.ld, target, c.loss + outcome,
         c.q_mean + outcome, nullptr},
        nullptr,
        nullptr};
    p.value_memory = memory.array<char>(operations.bytes(p.value));
    p.step_memory = memory.array<char>(operations.bytes(p.step));
    return p;
}

template <typename Operations>
static inline void update_part(const Operations& operations, const CudaCriticUpdates& c,
                               const UpdatePart& part) {
    const CriticUpdates& u = c.updates;
    operations.run(part.value, part.value_memory);
    for_elements(operations.launch, part.step.rows, part.target);
    for_elements(operations.launch, u.parameter_count, SetZero{part.step.gradients});
    operations.run(part.step, part.step_memory);
    operations.run(AdamArgs{u.parameter_count, u.parameters, part.step.gradients, u.first_moment,
                            u.second_moment, 0, 0.0, u.beta1, u.beta2, u.epsilon},
                   c.schedule);
    operations.run(SoftUpdateArgs{u.parameter_count, u.target_parameters, u.parameters, u.tau});
}

template <typename Operations>
static inline size_t critic_updates_bytes(const Operations& operations,
                                          const CudaCriticUpdates& c) {
    Carver memory(nullptr);
    make_part(operations, c, carve_transitions(c.updates, memory), 0, memory);
    return memory.used();
}

template <typename Operations>
static inline void critic_updates(const Operations& operations, const CudaCriticUpdates& c,
                                  void* workspace) {
    Carver memory(workspace);
    const CriticUpdates& u = c.updates;
    const Transitions all = carve_transitions(u, memory);
    next_actions(operations, c, all.next);
    write_seen(operations, u.pair, all.next_pairs);
    write_seen(operations, u.pair, all.taken_pairs);
    for (int i = 0; i < u.updates; ++i) {
        Carver own = memory;  // the same for every update: they follow each other
        update_part(operations, c, make_part(operations, c, all, i, own));
    }
}

}  // namespace flame::FLAME_ISA
