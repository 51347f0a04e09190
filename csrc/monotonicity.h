// How far a map is from strictly monotone: the wall against folding (flame_ext/reference.py,
// monotonicity_gap). Plain C++, the same for every instruction set: a policy batch has a few
// hundred small matrices.
#pragma once

#include <stdint.h>

namespace flame {

// gap_b = max(margin - smallest eigenvalue of (M_b + M_b') / 2, 0) and its gradient d gap_b / d M_b
struct MonotonicityArgs {
    int64_t rows;
    int32_t n;
    const float* transport;  // M (rows, n, n)
    double margin;
    float* gap;       // (rows)
    float* gradient;  // (rows, n, n)
};

void monotonicity_gap(const MonotonicityArgs& args);

}  // namespace flame
