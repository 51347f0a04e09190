// Adam (Kingma and Ba 2015) over a flat buffer and the soft update of a target network.
//
// All arrays (count) and the schedule: device memory of the caller. Learning rate and step are read
// from device memory, and the step is counted there, so that a captured graph may be replayed: a
// launch of one thread advances the schedule, a second one updates.
//
// adam reads 16 and writes 12 bytes per parameter, soft_update 8 and 4: 0.28 million parameters
// (critics 3 x 256) 7.8 MB, floor 2.3 us at 3.35 TB/s, and 3.3 MB, 1.0 us; both from L2 in
// practice.
#pragma once

#include "adam_formulas.h"
#include "cpu/training.h"
#include "cuda/elements.h"
#include "cuda/training.h"

namespace flame::FLAME_ISA {

struct AdvanceKernel {
    static constexpr const char* kName = "adam_advance";
    AdamSchedule* schedule;
    FLAME_BODY void operator()(const Block& block) const {
        block.each_thread([&](int t) {
            if (t == 0) schedule->step += 1;
        });
    }
};

struct AdamKernel {
    static constexpr const char* kName = "adam";
    AdamArgs a;
    const AdamSchedule* schedule;

    FLAME_BODY void operator()(const Block& block) const {
        // Powers in double cost more than a block's updates: one thread computes them.
        auto* k = reinterpret_cast<AdamConstants*>(block.shared);
        block.each_thread([&](int t) {
            if (t != 0) return;
            *k = adam_constants(schedule->step, schedule->learning_rate, a.beta1, a.beta2,
                                a.epsilon);
        });
        each_element(block, a.count, [&](int64_t i) { update(i, *k); });
    }

    FLAME_BODY void update(int64_t i, const AdamConstants& k) const {
        float m = a.first_moment[i];
        float v = a.second_moment[i];
        a.parameters[i] = adam_update(a.parameters[i], a.gradients[i], m, v, k);
        a.first_moment[i] = m;
        a.second_moment[i] = v;
    }
};

struct SoftUpdate {
    static constexpr const char* kName = "soft_update";
    SoftUpdateArgs a;

    FLAME_BODY void operator()(int64_t i) const {
        a.target[i] = soft_updated(a.target[i], a.online[i], a.tau);
    }
};

// `a.step` and `a.learning_rate` are not read: the schedule has them.
static inline void adam(const Launcher& launch, const AdamArgs& a, AdamSchedule* schedule) {
    launch(AdvanceKernel{schedule}, 1, 0);
    launch(AdamKernel{a, schedule}, element_blocks(a.count), sizeof(AdamConstants) / sizeof(float));
}

static inline void soft_update(const Launcher& launch, const SoftUpdateArgs& a) {
    for_elements(launch, a.count, SoftUpdate{a});
}

}  // namespace flame::FLAME_ISA
