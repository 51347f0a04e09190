// Acting: best of N actions of a flow policy, one call for any number of states.
//
// obs (states, O), noise (states, samples, A) dense, time (steps, time_features), scale (steps),
// action (states, A): device memory of the caller, and a workspace. The policy's input columns are
// [z | observation | time features], the critics' [action | observation].
#pragma once

#include "cuda/policy_act_few.h"
#include "cuda/policy_act_many.h"

namespace flame::FLAME_ISA {

static inline void count_policy_act(const Launcher& launch, const PolicyActArgs& a,
                                    Carver& memory) {
    const FewPlan plan = find_few_plan(launch, a);
    if (plan.blocks > 0) {
        carve_few(plan, memory);
    } else if (a.samples > 1) {
        carve_twin_q(carve_many(a, memory).twin_q, memory);
    }
}

static inline void policy_act(const Launcher& launch, const PolicyActArgs& a, Carver& memory) {
    if (a.states == 0) return;
    const FewPlan plan = find_few_plan(launch, a);
    if (plan.blocks > 0) {
        act_few(launch, a, plan, memory);
    } else {
        act_many(launch, a, memory);
    }
}

}  // namespace flame::FLAME_ISA
