// How far a map is from strictly monotone: the wall against folding (flame_ext/reference.py,
// monotonicity_gap). Plain C++: a policy batch has a few hundred small matrices.
#pragma once

#include <stdint.h>

namespace flame {

// gap_b = max(margin - smallest eigenvalue of (M_b + M_b') / 2, 0) and d gap_b / d M_b, for
// transport M (rows, n, n); gap (rows), gradient (rows, n, n).
void monotonicity_gap(int64_t rows, int n, const float* transport, double margin, float* gap,
                      float* gradient);

}  // namespace flame
