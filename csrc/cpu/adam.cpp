// Adam (Kingma and Ba 2015) over a flat buffer and the soft update of a target network.
//
// adam reads 16 and writes 12 bytes per parameter, soft_update 8 and 4: both run at memory speed.
#include "cpu/simd.h"
#include "cpu/training_kernels.h"
#include "thread_pool.h"

namespace flame::FLAME_ISA {
namespace {

constexpr int64_t kGrain = 1 << 14;

struct AdamConstants {
    float rate1;  // 1 - beta1, rounded once
    float beta2;
    float rate2;           // 1 - beta2
    float step_size;       // learning_rate / (1 - beta1^step)
    float inverse_scale2;  // 1 / sqrt(1 - beta2^step)
    float epsilon;
};

// The order of operations is torch.optim.Adam's: denom = sqrt(v) / sqrt(1 - beta2^t) + eps.
FLAME_INLINE vf adam_update(vf p, vf g, vf& m, vf& v, const AdamConstants& k) {
    m = fma(splat(k.rate1), g - m, m);
    v = fma(splat(k.rate2) * g, g, splat(k.beta2) * v);
    const vf denominator = fma(sqrt(v), splat(k.inverse_scale2), splat(k.epsilon));
    return fma(splat(-k.step_size), m / denominator, p);
}

// A partial vector at the end of a range goes through a zero-filled copy.
template <typename Body>
inline void for_vectors(int64_t begin, int64_t end, Body&& body) {
    for (int64_t i = begin; i < end; i += kLanes) {
        body(i, static_cast<int>(end - i < kLanes ? end - i : kLanes));
    }
}

FLAME_INLINE vf load_some(const float* p, int count) {
    if (count == kLanes) return load(p);
    vf a = zero();
    for (int i = 0; i < count; ++i) a[i] = p[i];
    return a;
}

FLAME_INLINE void store_some(float* p, vf a, int count) {
    if (count == kLanes) return store(p, a);
    for (int i = 0; i < count; ++i) p[i] = a[i];
}

}  // namespace

void adam(const AdamArgs& a) {
    const double correction1 = 1.0 - __builtin_pow(a.beta1, static_cast<double>(a.step));
    const double correction2 = 1.0 - __builtin_pow(a.beta2, static_cast<double>(a.step));
    const AdamConstants k = {static_cast<float>(1.0 - a.beta1),
                             static_cast<float>(a.beta2),
                             static_cast<float>(1.0 - a.beta2),
                             static_cast<float>(a.learning_rate / correction1),
                             static_cast<float>(1.0 / __builtin_sqrt(correction2)),
                             static_cast<float>(a.epsilon)};
    parallel_for(a.count, kGrain, [&](int64_t begin, int64_t end) {
        for_vectors(begin, end, [&](int64_t i, int n) {
            vf m = load_some(a.first_moment + i, n);
            vf v = load_some(a.second_moment + i, n);
            const vf p =
                adam_update(load_some(a.parameters + i, n), load_some(a.gradients + i, n), m, v, k);
            store_some(a.parameters + i, p, n);
            store_some(a.first_moment + i, m, n);
            store_some(a.second_moment + i, v, n);
        });
    });
}

void soft_update(const SoftUpdateArgs& a) {
    const vf tau = splat(a.tau);
    parallel_for(a.count, kGrain, [&](int64_t begin, int64_t end) {
        for_vectors(begin, end, [&](int64_t i, int n) {
            const vf target = load_some(a.target + i, n);
            store_some(a.target + i, fma(tau, load_some(a.online + i, n) - target, target), n);
        });
    });
}

}  // namespace flame::FLAME_ISA
