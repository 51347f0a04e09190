// How far transport matrices are from strictly monotone, with the gradient (monotonicity.h), in
// double like the CPU's.
//
// One block per matrix, of which one warp works, each lane on rows of its own: a Cholesky
// factorisation first, which is all that most matrices need, then Jacobi sweeps in shared memory,
// two matrices of doubles (6 x 6: 0.6 kB, 64 x 64: 64 kB). Memory moves nothing to speak of (32
// states of 6 x 6: 9 kB); the sweeps are a chain: 90 rotations, each of three divisions, two square
// roots and three barriers, some 25 us expected, not measured.
#pragma once

#include "cuda/launch.h"
#include "jacobi_rotation.h"
#include "monotonicity.h"

namespace flame::FLAME_ISA {

struct MonotonicityKernel {
    static constexpr const char* kName = "monotonicity_gap";
    MonotonicityArgs a;

    // A block's shared memory.
    struct Matrices {
        double* symmetric;
        double* other;     // the factor, then the eigenvectors as columns
        double* rotation;  // cosine and tangent
    };

    static size_t shared_floats(int n) {
        return (2 * n * n + 2) * (sizeof(double) / sizeof(float));
    }

    FLAME_BODY void operator()(const Block& block) const {
        const int n = a.n;
        auto* memory = reinterpret_cast<double*>(block.shared);
        const Matrices m{memory, memory + n * n, memory + 2 * n * n};
        block.each_warp([&](const Warp& warp) {
            if (warp.index == 0) matrix_gap(warp, block.index, m);
        });
    }

    FLAME_BODY void matrix_gap(const Warp& warp, int64_t row, const Matrices& m) const {
        const int n = a.n;
        const float* transport = a.transport + row * n * n;
        float* gradient = a.gradient + row * n * n;
        warp.each(n * n, [&](int e) {
            const auto there = static_cast<double>(transport[e]);
            const auto back = static_cast<double>(transport[e % n * n + e / n]);
            m.symmetric[e] = 0.5 * (there + back);
        });
        const double sum = warp.sum<double>(n * n, [&](int e) { return ::fabs(m.symmetric[e]); });
        const bool finite = sum <= kLargest;  // else the sweeps would leave any number
        if (!finite || all_above(warp, m)) {
            const float value = finite ? 0.0f : NAN;
            warp.each(n * n, [&](int e) { gradient[e] = value; });
            warp.each(1, [&](int) { a.gap[row] = value; });
            return;
        }
        warp.meet();  // the factor's last pivot is read; eigenvectors overwrite it
        const int column = smallest_eigenvalue(warp, m);
        warp.each(n * n, [&](int e) {
            const double product = m.other[e / n * n + column] * m.other[e % n * n + column];
            gradient[e] = static_cast<float>(-product);
        });
        warp.each(1, [&](int) {
            a.gap[row] = static_cast<float>(a.margin - m.symmetric[column * (n + 1)]);
        });
    }

    // Whether all eigenvalues lie above the margin: whether L D L' has positive pivots.
    FLAME_BODY bool all_above(const Warp& warp, const Matrices& m) const {
        const int n = a.n;
        double* f = m.other;
        warp.each(n * n,
                  [&](int e) { f[e] = m.symmetric[e] - (e % (n + 1) == 0 ? a.margin : 0.0); });
        for (int k = 0; k < n; ++k) {
            // By one lane: another may be ahead of it, at what follows, and write.
            const double pivot = warp.sum<double>(1, [&](int) { return f[k * (n + 1)]; });
            if (!(pivot > 0.0)) return false;
            warp.each(n - k - 1, [&](int r) {
                const int i = k + 1 + r;
                const double factor = f[i * n + k] / pivot;
                for (int j = k + 1; j <= i; ++j) f[i * n + j] -= factor * f[j * n + k];
            });
        }
        return true;
    }

    // Diagonalises `symmetric` in place; returns the smallest eigenvalue's column.
    FLAME_BODY int smallest_eigenvalue(const Warp& warp, const Matrices& m) const {
        const int n = a.n;
        warp.each(n * n, [&](int e) { m.other[e] = e % (n + 1) == 0 ? 1.0 : 0.0; });
        const auto square = [&](int e) { return m.symmetric[e] * m.symmetric[e]; };
        for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
            const double all = warp.sum<double>(n * n, square);
            const double off =
                warp.sum<double>(n * n, [&](int e) { return e % (n + 1) == 0 ? 0.0 : square(e); });
            if (!(off > kClearedPart * all)) break;
            for (int p = 0; p < n; ++p) {
                for (int q = p + 1; q < n; ++q) rotate(warp, p, q, m);
            }
        }
        return first_largest(warp, n, -HUGE_VAL, [&](int i) { return -m.symmetric[i * (n + 1)]; });
    }

    FLAME_BODY void rotate(const Warp& warp, int p, int q, const Matrices& m) const {
        const int n = a.n;
        double* s = m.symmetric;
        double* v = m.other;
        // One lane reads the matrix: another may be ahead of it and write.
        warp.each(1, [&](int) {
            const double pq = s[p * n + q];
            JacobiRotation r{1.0, 0.0};
            if (pq != 0.0) r = jacobi_rotation(s[p * (n + 1)], s[q * (n + 1)], pq);
            m.rotation[0] = r.cosine;
            m.rotation[1] = r.tangent;
        });
        const double c = m.rotation[0];
        const double t = m.rotation[1];
        const auto turn = [c, t](double& x, double& y) {
            const double former = x;
            x = c * (former - t * y);
            y = c * (t * former + y);
        };
        warp.each(n, [&](int k) { turn(s[k * n + p], s[k * n + q]); });
        warp.each(n, [&](int k) {
            turn(s[p * n + k], s[q * n + k]);
            turn(v[k * n + p], v[k * n + q]);
        });
    }

    static constexpr double kLargest = 1.7976931348623157e308;
};

static inline void monotonicity_gap(const Launcher& launch, const MonotonicityArgs& a) {
    launch(MonotonicityKernel{a}, a.rows, MonotonicityKernel::shared_floats(a.n));
}

}  // namespace flame::FLAME_ISA
