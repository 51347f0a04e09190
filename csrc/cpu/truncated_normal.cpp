#include "cpu/truncated_intervals.h"

#include "cpu/training_kernels.h"
#include "thread_pool.h"

namespace flame::FLAME_ISA {

void truncated_normals(const TruncatedNormalArgs& a) {
    parallel_for(a.count, 256, [&](int64_t begin, int64_t end) {
        double memory[6][kDoubles];
        double uniform[kDoubles];
        const IntervalArrays at{memory[0], memory[1], memory[2], memory[3], memory[4], memory[5]};
        for (int64_t i = begin; i < end; i += kDoubles) {
            const int n = static_cast<int>(end - i < kDoubles ? end - i : kDoubles);
            for (int k = 0; k < kDoubles; ++k) {
                const int64_t from = i + (k < n ? k : 0);
                set_interval(at, k, truncated_interval(a.low[from], a.high[from]));
                uniform[k] = a.uniform[from];
            }
            const vd x = truncated_normal(at, 0, load_d(uniform));
            for (int k = 0; k < n; ++k) a.output[i + k] = static_cast<float>(x[k]);
        }
    });
}

}  // namespace flame::FLAME_ISA
