// Whole updates of soft critics in one sequence of launches: a flow's next actions in all next
// states, then for each update its TD target, the critics' gradient, Adam and the targets' average.
//
// All pointers of the updates are device memory of the caller, and so are the sampler's tables,
// which replace those inside `policy`, and alpha. The schedule has Adam's rate and step. loss,
// q_mean (updates, members). Workspace: next actions, target, gradient and that of the operations,
// the latter once for all updates.
//
// `operations` runs the kernels of other files and knows their workspaces: run(args), bytes(args).
//
// Ten launches per update. Four updates of 64 transitions, 23 -> 2 x 256 -> 1: 0.34 GFLOP, floor
// 5 us at 67 TFLOP/s; launches in a graph take about 1.5 us each, so that latency decides.
#pragma once

#include "critic_updates.h"
#include "cuda/best_action.h"
#include "cuda/elements.h"
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

// y = reward + gamma (1 - terminated) (Qmin'(s', a') - alpha log pi(a' | s'))
struct TdTarget {
    static constexpr const char* kName = "td_target";
    const float* q_min;
    const float* log_prob;  // null: without the entropy
    const float* reward;
    int64_t reward_ld;
    const float* terminated;
    int64_t terminated_ld;
    float reward_scale;
    float gamma;
    const double* alpha;  // with log_prob
    float* target;

    FLAME_BODY void operator()(int64_t i) const {
        const float entropy =
            log_prob != nullptr ? -static_cast<float>(*alpha) * log_prob[i] : 0.0f;
        target[i] = td_target(reward_scale * reward[i * reward_ld], terminated[i * terminated_ld],
                              gamma, q_min[i], entropy);
    }
};

struct NextActions {
    float* action;    // (rows, A)
    float* log_prob;  // (rows)
    bool* folded;     // (rows)
};

static inline NextActions carve_next_actions(const CriticUpdates& u, Carver& memory) {
    const auto rows = static_cast<size_t>(u.rows);
    return {memory.floats(rows * u.policy->action_dim), memory.floats(rows),
            memory.array<bool>(rows)};
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
                                   const NextActions& next, int part, Carver& memory) {
    const CriticUpdates& u = c.updates;
    const int64_t rows = u.rows / u.updates;
    const int64_t first = part * rows;
    const int action_dim = u.policy->action_dim;
    float* q_min = memory.floats(rows);
    float* target = memory.floats(rows);
    float* gradients = memory.floats(u.parameter_count);
    const int64_t outcome = static_cast<int64_t>(part) * u.critics.members;
    UpdatePart p{
        {u.critics, u.target_parameters, rows, 1, action_dim, u.next_obs + first * u.next_obs_ld,
         u.next_obs_ld, next.action + first * action_dim, q_min, nullptr},
        {q_min, c.alpha != nullptr ? next.log_prob + first : nullptr,
         u.reward + first * u.reward_ld, u.reward_ld, u.terminated + first * u.terminated_ld,
         u.terminated_ld, u.reward_scale, u.gamma, c.alpha, target},
        {u.critics, u.parameters, gradients, rows, action_dim, u.obs + first * u.obs_ld, u.obs_ld,
         u.action + first * u.action_ld, u.action_ld, target, c.loss + outcome, c.q_mean + outcome,
         nullptr},
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
    make_part(operations, c, carve_next_actions(c.updates, memory), 0, memory);
    return memory.used();
}

template <typename Operations>
static inline void critic_updates(const Operations& operations, const CudaCriticUpdates& c,
                                  void* workspace) {
    Carver memory(workspace);
    const NextActions next = carve_next_actions(c.updates, memory);
    next_actions(operations, c, next);
    for (int i = 0; i < c.updates.updates; ++i) {
        Carver own = memory;  // the same for every update: they follow each other
        update_part(operations, c, make_part(operations, c, next, i, own));
    }
}

}  // namespace flame::FLAME_ISA
