// The rotation that clears an element of a symmetric matrix, the same on the CPU and in CUDA.
#pragma once

#include <math.h>

#include "float_bits.h"

namespace flame {

struct JacobiRotation {
    double cosine;
    double tangent;
};

// Clears the element pq between the diagonal's pp and qq (Golub and Van Loan, Sec. 8.5); pq != 0.
FLAME_HD JacobiRotation jacobi_rotation(double pp, double qq, double pq) {
    const double theta = (qq - pp) / (2.0 * pq);
    const double t = ::copysign(1.0, theta) / (::fabs(theta) + ::sqrt(theta * theta + 1.0));
    return {1.0 / ::sqrt(t * t + 1.0), t};
}

// Sweeps of rotations end when the squares off the diagonal are this part of all, or after
// kMaxSweeps: convergence is quadratic, six are usual.
constexpr double kClearedPart = 1e-28;
constexpr int kMaxSweeps = 20;

}  // namespace flame
