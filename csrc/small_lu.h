// Determinant and inverse of one small matrix per sample, in double: A is at most a few dozen, so
// accuracy is free beside the network, and I - J may be badly conditioned.
#pragma once

#include <math.h>

#include "lanes.h"
#include "mlp_spec.h"

namespace flame::FLAME_ISA {

constexpr int kMaxActions = kMaxActionColumns;

struct LogDet {
    double log_abs;
    bool negative;
};

// In place LU with partial pivoting of the n x n row-major `m`; pivot[k] is the row swapped with k.
FLAME_INLINE LogDet lu_factor(double* m, int n, int* pivot) {
    LogDet result{0.0, false};
    for (int k = 0; k < n; ++k) {
        int best = k;
        for (int i = k + 1; i < n; ++i) {
            if (::fabs(m[i * n + k]) > ::fabs(m[best * n + k])) best = i;
        }
        pivot[k] = best;
        if (best != k) {
            result.negative = !result.negative;
            for (int j = 0; j < n; ++j) {
                const double t = m[k * n + j];
                m[k * n + j] = m[best * n + j];
                m[best * n + j] = t;
            }
        }
        const double diagonal = m[k * n + k];
        if (diagonal < 0.0) result.negative = !result.negative;
        result.log_abs += ::log(::fabs(diagonal));
        for (int i = k + 1; i < n; ++i) {
            const double factor = m[i * n + k] / diagonal;
            m[i * n + k] = factor;
            for (int j = k + 1; j < n; ++j) m[i * n + j] -= factor * m[k * n + j];
        }
    }
    return result;
}

// x (n) = a column of the inverse, from lu_factor's result.
FLAME_INLINE void lu_inverse_column(const double* lu, const int* pivot, int n, int column,
                                    double* x) {
    for (int i = 0; i < n; ++i) x[i] = i == column ? 1.0 : 0.0;
    for (int k = 0; k < n; ++k) {
        const double t = x[k];
        x[k] = x[pivot[k]];
        x[pivot[k]] = t;
    }
    for (int i = 0; i < n; ++i) {
        for (int j = 0; j < i; ++j) x[i] -= lu[i * n + j] * x[j];
    }
    for (int i = n - 1; i >= 0; --i) {
        for (int j = i + 1; j < n; ++j) x[i] -= lu[i * n + j] * x[j];
        x[i] /= lu[i * n + i];
    }
}

// inverse (n x n, row-major) from lu_factor's result.
FLAME_INLINE void lu_inverse(const double* lu, const int* pivot, int n, double* inverse) {
    double x[kMaxActions];
    for (int column = 0; column < n; ++column) {
        lu_inverse_column(lu, pivot, n, column, x);
        for (int i = 0; i < n; ++i) inverse[i * n + column] = x[i];
    }
}

}  // namespace flame::FLAME_ISA
