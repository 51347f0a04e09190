// The target policy's marginal velocity at z by self-normalised importance weights over reverse
// candidates (FLAME, Sec. 4.1): candidates, twin Q (twin_q.h), softmax; the same uniforms as the
// CPU's kernel.
//
// alpha and seed: one number each in device memory. obs (states, O); z and velocity (states, A)
// dense; signal, scale, ess (states); uniform (states, K, A) for kGiven: device memory of the
// caller. Workspace: candidates (states, K, A), for kStratified as many draws that order them, Qmin
// (states, K) and twin Q's.
//
// Beside twin Q (twin_q.h: 0.13 or 0.20 ms at B 256, K 100) the two other launches move 1.4 MB, 0.4
// us at 3.35 TB/s and mostly in L2, and do about 150 double operations per coordinate: 23 MFLOP,
// 0.7 us at the 34 TFLOP/s of an H100's double units, 30 times that where a device has few of them.
#pragma once

#include "cuda/training.h"
#include "cuda/twin_q.h"
#include "partition.h"
#include "reverse_candidates.h"
#include "truncated_normal.h"

namespace flame::FLAME_ISA {

// actions (states, K, A), order (states, A, K) for kStratified. One block per state: its intervals
// and the draws of its order first, then a Philox block of four draws per thread.
struct CandidatesKernel {
    static constexpr const char* kName = "reverse_candidates";
    ReweightedArgs a;
    const uint64_t* seed;
    float* actions;
    float* order;

    FLAME_BODY void operator()(const Block& block) const {
        const int64_t state = block.index;
        auto* intervals = reinterpret_cast<TruncatedInterval*>(block.shared);
        block.each_thread([&](int t) {
            if (t >= a.action_dim) return;
            const double z = static_cast<double>(a.z[state * a.action_dim + t]);
            const double signal = posterior_is_uniform(a.signal[state])
                                      ? kLeastSignal
                                      : static_cast<double>(a.signal[state]);
            const double scale = static_cast<double>(a.scale[state]);
            intervals[t] = truncated_interval((z - signal) / scale, (z + signal) / scale);
        });
        const uint64_t count = static_cast<uint64_t>(a.candidates) * a.action_dim;
        const uint64_t first = static_cast<uint64_t>(state) * count;
        const auto each_philox_block = [&](auto&& body) {
            block.each_thread([&](int t) {
                for (uint64_t q = first / 4 + t; q <= (first + count - 1) / 4; q += kThreads) {
                    body(q);
                }
            });
        };
        if (a.source == Candidates::kStratified) {
            each_philox_block([&](uint64_t q) { four_orders(q, first, first + count); });
        }
        each_philox_block(
            [&](uint64_t q) { four_draws(q, first, first + count, state, intervals); });
    }

    // The order's draws with flat index 4 q .. 4 q + 3, as far as they are this state's.
    FLAME_BODY void four_orders(uint64_t q, uint64_t first, uint64_t end) const {
        const PhiloxBlock bits = philox_block(*seed, a.stream + 2, a.offset + q);
        for (int i = 0; i < 4; ++i) {
            const uint64_t flat = 4 * q + i;
            if (flat < first || flat >= end) continue;
            const uint64_t k = (flat - first) / a.action_dim;
            const uint64_t j = (flat - first) % a.action_dim;
            order[first + j * a.candidates + k] = uniform_from_bits(bits.v[i]);
        }
    }

    // The candidates' coordinates with flat index 4 q .. 4 q + 3, as far as they are this state's.
    FLAME_BODY void four_draws(uint64_t q, uint64_t first, uint64_t end, int64_t state,
                               const TruncatedInterval* intervals) const {
        PhiloxBlock bits{};
        if (a.source != Candidates::kGiven) {
            bits = philox_block(*seed, a.stream, a.offset + q);
        }
        for (int i = 0; i < 4; ++i) {
            const uint64_t flat = 4 * q + i;
            if (flat < first || flat >= end) continue;
            const int j = static_cast<int>((flat - first) % a.action_dim);
            const double u = inside_unit(uniform(flat, first, j, bits.v[i]));
            const TruncatedInterval& t = intervals[j];
            const double x =
                truncated_draw(t.log_upper, t.p_upper, t.ratio, t.lower, t.upper, t.sign, u);
            const float z = a.z[state * a.action_dim + j];
            actions[flat] = reverse_candidate(z, a.signal[state], a.scale[state], u, x).action;
        }
    }

    FLAME_BODY double uniform(uint64_t flat, uint64_t first, int j, uint32_t bits) const {
        if (a.source == Candidates::kGiven) return static_cast<double>(a.uniform[flat]);
        const double u = static_cast<double>(uniform_from_bits(bits));
        if (a.source == Candidates::kRandom) return u;
        const int k = static_cast<int>((flat - first) / a.action_dim);
        const float* of_coordinate = order + first + static_cast<uint64_t>(j) * a.candidates;
        return in_stratum(rank_of(of_coordinate, a.candidates, k), a.candidates, u);
    }
};

// One warp per state.
struct SoftmaxKernel {
    static constexpr const char* kName = "reweighted_softmax";
    ReweightedArgs a;
    const double* alpha;
    const float* actions;
    const float* q_min;

    FLAME_BODY void operator()(const Block& block) const {
        block.each_warp([&](const Warp& warp) {
            const int64_t state = block.index * kWarps + warp.index;
            if (state < a.states) reduce_state(warp, state);
        });
    }

    FLAME_BODY void reduce_state(const Warp& warp, int64_t state) const {
        const int n = a.candidates;
        const float* q = q_min + state * n;
        const float* action = actions + state * n * a.action_dim;
        const double temperature = *alpha;
        const auto logit = [&](int k) { return static_cast<double>(q[k]) / temperature; };
        const double top = warp.largest(n, -HUGE_VAL, logit);
        const auto weight = [&](int k) { return ::exp(logit(k) - top); };
        const double sum = warp.sum<double>(n, weight);
        const double squares = warp.sum<double>(n, [&](int k) { return weight(k) * weight(k); });
        const double signal = static_cast<double>(a.signal[state]);
        const double scale = static_cast<double>(a.scale[state]);
        for (int j = 0; j < a.action_dim; ++j) {
            const double z = static_cast<double>(a.z[state * a.action_dim + j]);
            const double total = warp.sum<double>(n, [&](int k) {
                const double x = static_cast<double>(action[k * a.action_dim + j]);
                const float noise = static_cast<float>((z - signal * x) / scale);
                return weight(k) * (static_cast<double>(noise) - x);
            });
            warp.each(1, [&](int) {
                a.velocity[state * a.action_dim + j] = static_cast<float>(total / sum);
            });
        }
        warp.each(1, [&](int) { a.ess[state] = static_cast<float>(sum * sum / squares); });
    }
};

struct ReweightedMemory {
    float* actions;
    float* order;
    float* q_min;
    TwinQArgs twin_q;
};

static inline ReweightedMemory carve_reweighted(const ReweightedArgs& a, Carver& memory) {
    const size_t candidates = static_cast<size_t>(a.states) * a.candidates;
    ReweightedMemory m{};
    m.actions = memory.floats(candidates * a.action_dim);
    m.order = memory.floats(a.source == Candidates::kStratified ? candidates * a.action_dim : 0);
    m.q_min = memory.floats(candidates);
    m.twin_q = {a.spec, a.parameters, a.states,  a.candidates, a.action_dim,
                a.obs,  a.obs_ld,     m.actions, m.q_min,      nullptr};
    return m;
}

static inline void count_reweighted(const ReweightedArgs& a, Carver& memory) {
    carve_twin_q(carve_reweighted(a, memory).twin_q, memory);
}

static inline void reweighted_velocity(const Launcher& launch, const CudaReweighted& args,
                                       bool tensor_cores, Carver& memory) {
    const ReweightedArgs& a = args.reweighted;
    if (a.states == 0) return;
    const ReweightedMemory m = carve_reweighted(a, memory);
    launch(CandidatesKernel{a, args.seed, m.actions, m.order}, a.states,
           a.action_dim * (sizeof(TruncatedInterval) / sizeof(float)));
    twin_q(launch, m.twin_q, tensor_cores, memory);
    launch(SoftmaxKernel{a, args.alpha, m.actions, m.q_min}, divide_up(a.states, kWarps), 0);
}

}  // namespace flame::FLAME_ISA
