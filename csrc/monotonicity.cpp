#include "monotonicity.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "jacobi_rotation.h"
#include "thread_pool.h"

namespace flame {
namespace {

constexpr int64_t kGrain = 16;  // rows that are worth a thread: a few microseconds

// Square matrices of one size, reused from row to row.
struct Matrices {
    explicit Matrices(int size) : n(size), symmetric(n * n), factor(n * n), vectors(n * n) {}
    int n;
    std::vector<double> symmetric;
    std::vector<double> factor;
    std::vector<double> vectors;  // eigenvectors as columns
};

void load_symmetric_part(const float* transport, Matrices& m) {
    for (int i = 0; i < m.n; ++i) {
        for (int j = 0; j < m.n; ++j) {
            const double there = static_cast<double>(transport[i * m.n + j]);
            const double back = static_cast<double>(transport[j * m.n + i]);
            m.symmetric[i * m.n + j] = 0.5 * (there + back);
        }
    }
}

// Whether all eigenvalues lie above `margin`, by Cholesky: true for most rows, and far cheaper than
// their eigenvalues.
bool all_above(double margin, Matrices& m) {
    const int n = m.n;
    double* l = m.factor.data();
    for (int i = 0; i < n; ++i) {
        for (int j = 0; j <= i; ++j) {
            double sum = m.symmetric[i * n + j] - (i == j ? margin : 0.0);
            for (int k = 0; k < j; ++k) sum -= l[i * n + k] * l[j * n + k];
            if (i == j && !(sum > 0.0)) return false;  // NaN is not above anything
            l[i * n + j] = i == j ? std::sqrt(sum) : sum / l[j * n + j];
        }
    }
    return true;
}

// Clears the element (p, q).
void rotate(int p, int q, Matrices& m) {
    const int n = m.n;
    double* s = m.symmetric.data();
    double* v = m.vectors.data();
    const auto [c, t] = jacobi_rotation(s[p * n + p], s[q * n + q], s[p * n + q]);
    for (int k = 0; k < n; ++k) {
        const double sp = s[k * n + p];
        const double sq = s[k * n + q];
        s[k * n + p] = c * (sp - t * sq);
        s[k * n + q] = c * (t * sp + sq);
    }
    for (int k = 0; k < n; ++k) {
        const double sp = s[p * n + k];
        const double sq = s[q * n + k];
        s[p * n + k] = c * (sp - t * sq);
        s[q * n + k] = c * (t * sp + sq);
        const double vp = v[k * n + p];
        const double vq = v[k * n + q];
        v[k * n + p] = c * (vp - t * vq);
        v[k * n + q] = c * (t * vp + vq);
    }
}

// Diagonalises `symmetric` in place; returns the smallest eigenvalue's column.
int smallest_eigenvalue(Matrices& m) {
    const int n = m.n;
    for (int i = 0; i < n * n; ++i) m.vectors[i] = i % (n + 1) == 0 ? 1.0 : 0.0;
    for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
        double off = 0.0;
        double all = 0.0;
        for (int i = 0; i < n * n; ++i) {
            const double square = m.symmetric[i] * m.symmetric[i];
            all += square;
            if (i % (n + 1) != 0) off += square;
        }
        if (!(off > kClearedPart * all)) break;
        for (int p = 0; p < n; ++p) {
            for (int q = p + 1; q < n; ++q) {
                if (m.symmetric[p * n + q] != 0.0) rotate(p, q, m);
            }
        }
    }
    int smallest = 0;
    for (int i = 1; i < n; ++i) {
        if (m.symmetric[i * (n + 1)] < m.symmetric[smallest * (n + 1)]) smallest = i;
    }
    return smallest;
}

// The gap of one matrix and its gradient.
float matrix_gap(const float* transport, double margin, Matrices& m, float* gradient) {
    const int n = m.n;
    load_symmetric_part(transport, m);
    double sum = 0.0;
    for (int i = 0; i < n * n; ++i) sum += std::fabs(m.symmetric[i]);
    if (!std::isfinite(sum)) {  // would end the sweeps and leave any number
        std::fill_n(gradient, n * n, NAN);
        return NAN;
    }
    std::fill_n(gradient, n * n, 0.0f);
    if (all_above(margin, m)) return 0.0f;
    const int column = smallest_eigenvalue(m);
    for (int i = 0; i < n; ++i) {
        for (int j = 0; j < n; ++j) {
            const double product = m.vectors[i * n + column] * m.vectors[j * n + column];
            gradient[i * n + j] = static_cast<float>(-product);
        }
    }
    return static_cast<float>(margin - m.symmetric[column * (n + 1)]);
}

}  // namespace

void monotonicity_gap(const MonotonicityArgs& a) {
    parallel_for(a.rows, kGrain, [&](int64_t begin, int64_t end) {
        Matrices m(a.n);
        const int64_t size = static_cast<int64_t>(a.n) * a.n;
        for (int64_t b = begin; b < end; ++b) {
            a.gap[b] = matrix_gap(a.transport + b * size, a.margin, m, a.gradient + b * size);
        }
    });
}

}  // namespace flame
