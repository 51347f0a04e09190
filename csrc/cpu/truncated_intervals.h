// Intervals of truncated_normal.h as structure of arrays, so that draws of several coordinates go
// through one vector.
#pragma once

#include "truncated_normal.h"

namespace flame::FLAME_ISA {

struct IntervalArrays {
    double* log_upper;
    double* p_upper;
    double* ratio;
    double* lower;
    double* upper;
    double* sign;
};

FLAME_INLINE void set_interval(const IntervalArrays& to, int64_t i, const TruncatedInterval& t) {
    to.log_upper[i] = t.log_upper;
    to.p_upper[i] = t.p_upper;
    to.ratio[i] = t.ratio;
    to.lower[i] = t.lower;
    to.upper[i] = t.upper;
    to.sign[i] = t.sign;
}

// Draws of the intervals at position i .. i + kDoubles - 1 from uniforms in (0, 1).
FLAME_INLINE vd truncated_normal(const IntervalArrays& at, int64_t i, vd u) {
    return truncated_draw(load_d(at.log_upper + i), load_d(at.p_upper + i), load_d(at.ratio + i),
                          load_d(at.lower + i), load_d(at.upper + i), load_d(at.sign + i), u);
}

}  // namespace flame::FLAME_ISA
