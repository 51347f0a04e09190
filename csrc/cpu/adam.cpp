// Adam (Kingma and Ba 2015) over a flat buffer and the soft update of a target network.
//
// adam reads 16 and writes 12 bytes per parameter, soft_update 8 and 4: both run at memory speed.
#include "adam_formulas.h"
#include "cpu/simd.h"
#include "cpu/training_kernels.h"
#include "thread_pool.h"

namespace flame::FLAME_ISA {
namespace {

constexpr int64_t kGrain = 1 << 14;

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
    const AdamConstants k = adam_constants(a.step, a.learning_rate, a.beta1, a.beta2, a.epsilon);
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
    parallel_for(a.count, kGrain, [&](int64_t begin, int64_t end) {
        for_vectors(begin, end, [&](int64_t i, int n) {
            const vf target = load_some(a.target + i, n);
            store_some(a.target + i, soft_updated(target, load_some(a.online + i, n), a.tau), n);
        });
    });
}

}  // namespace flame::FLAME_ISA
