// N(0, 1) truncated to [low, high] by inverting its distribution function, in double: on vectors
// for the CPU's instruction sets, one value at a time for CUDA (cuda/scalar.h).
//
// Per interval (scalar, once): reflect it so that it lies to the left, and take log Phi(upper) and
// ratio = Phi(lower) / Phi(upper). Per draw u: log p = log Phi(upper) + log(u + (1 - u) ratio),
// which loses nothing in either tail, then x = Phi^-1(exp(log p)) by the rational approximations of
// Wichura (1988, AS 241), whose tail forms take sqrt(-log p) and so never see p itself underflow;
// beyond |x| = 37 by Mills' ratio.
#pragma once

#include <math.h>

#include "lanes.h"
#include "scalar_rules.h"

namespace flame::FLAME_ISA {

constexpr double kSqrtHalf = 0.70710678118654752440;

// log(x) of positive normal doubles: x = m 2^k with m in [sqrt(1/2), sqrt(2)), log m by the series
// of 2 atanh(s), s = (m - 1) / (m + 1), |s| < 0.1716; error about 1e-15 + 1e-16 |log x|.
FLAME_INLINE vd log_d(vd x) {
    const vu bits = bits_of(x);
    // The exponent as a double: in the low mantissa bits of 2^52.
    vd k = double_of((bits >> 52) | 0x4330000000000000ull) - (4503599627370496.0 + 1023.0);
    vd m = double_of((bits & 0x000FFFFFFFFFFFFFull) | 0x3FF0000000000000ull);
    const vl high = m > 1.41421356237309504880;
    m = high ? m * 0.5 : m;
    k = high ? k + 1.0 : k;
    const vd s = (m - 1.0) / (m + 1.0);
    const vd s2 = s * s;
    vd p = splat_d(1.0 / 19);
    for (int n = 17; n >= 3; n -= 2) p = p * s2 + 1.0 / n;
    return k * 0.69314718055994530942 + (2.0 * s + 2.0 * s * s2 * p);
}

// --- Wichura's PPND16: minus Phi^-1 of small probabilities and the centre

template <int kTerms>
FLAME_INLINE vd polynomial(vd x, const double (&c)[kTerms]) {
    vd p = splat_d(c[kTerms - 1]);
    FLAME_UNROLL
    for (int i = kTerms - 2; i >= 0; --i) p = p * x + c[i];
    return p;
}

// Phi^-1(0.5 + q), |q| <= 0.425.
FLAME_INLINE vd central_quantile(vd q) {
    constexpr double kA[8] = {3.3871328727963666080e0, 1.3314166789178437745e2,
                              1.9715909503065514427e3, 1.3731693765509461125e4,
                              4.5921953931549871457e4, 6.7265770927008700853e4,
                              3.3430575583588128105e4, 2.5090809287301226727e3};
    constexpr double kB[8] = {1.0,
                              4.2313330701600911252e1,
                              6.8718700749205790830e2,
                              5.3941960214247511077e3,
                              2.1213794301586595867e4,
                              3.9307895800092710610e4,
                              2.8729085735721942674e4,
                              5.2264952788528545610e3};
    const vd r = 0.180625 - q * q;
    return q * polynomial(r, kA) / polynomial(r, kB);
}

// -Phi^-1(p) for r = sqrt(-log p) <= 5.
FLAME_INLINE vd near_quantile(vd r) {
    constexpr double kC[8] = {1.42343711074968357734e0,  4.63033784615654529590e0,
                              5.76949722146069140550e0,  3.64784832476320460504e0,
                              1.27045825245236838258e0,  2.41780725177450611770e-1,
                              2.27238449892691845833e-2, 7.74545014278341407640e-4};
    constexpr double kD[8] = {1.0,
                              2.05319162663775882187e0,
                              1.67638483018380384940e0,
                              6.89767334985100004550e-1,
                              1.48103976427480074590e-1,
                              1.51986665636164571966e-2,
                              5.47593808499534494600e-4,
                              1.05075007164441684324e-9};
    return polynomial(r - 1.6, kC) / polynomial(r - 1.6, kD);
}

// The same for 5 < r <= 26.
FLAME_INLINE vd far_quantile(vd r) {
    constexpr double kE[8] = {6.65790464350110377720e0,  5.46378491116411436990e0,
                              1.78482653991729133580e0,  2.96560571828504891230e-1,
                              2.65321895265761230930e-2, 1.24266094738807843860e-3,
                              2.71155556874348757815e-5, 2.01033439929228813265e-7};
    constexpr double kF[8] = {1.0,
                              5.99832206555887937690e-1,
                              1.36929880922735805310e-1,
                              1.48753612908506148525e-2,
                              7.86869131145613259100e-4,
                              1.84631831751005468180e-5,
                              1.42151175831644588870e-7,
                              2.04426310338993978564e-15};
    return polynomial(r - 5.0, kE) / polynomial(r - 5.0, kF);
}

// log of x sqrt(2 pi) e^(x^2 / 2) Phi(-x): the asymptotic series of Mills' ratio, for x > 25.
FLAME_INLINE double log_mills_correction(double x) {
    const double i = 1.0 / (x * x);
    return ::log1p(-i * (1.0 - 3.0 * i * (1.0 - 5.0 * i * (1.0 - 7.0 * i))));
}

// Solves x^2 / 2 + log x - correction(x) + log sqrt(2 pi) = -log p; the iteration contracts by
// 1/x^2.
FLAME_INLINE double extreme_quantile(double log_p) {
    double x = ::sqrt(-2.0 * log_p);
    for (int i = 0; i < 8; ++i) {
        x = ::sqrt(2.0 * (-log_p - kHalfLog2Pi - ::log(x) + log_mills_correction(x)));
    }
    return x;
}

// Phi^-1(exp(log_p)), log_p < 0.
FLAME_INLINE vd quantile_from_log(vd log_p, vd p) {
    const vd q = p - 0.5;
    const vl upper = q > 0.0;
    // -log of the smaller tail; above the centre p is not small and 1 - p is exact enough for u.
    vd tail = -log_p;
    const vl outside = (q > 0.425) | (q < -0.425);
    if (any(upper & outside)) {
        const vd other = 1.0 - p;
        tail = upper ? -log_d(other > 1e-300 ? other : splat_d(1e-300)) : tail;
    }
    vd x = central_quantile(q);
    if (!any(outside)) return x;
    const vd r = sqrt_d(tail);
    vd y = near_quantile(r);
    if (any(r > 5.0)) y = r > 5.0 ? far_quantile(r) : y;
    for (int i = 0; i < kDoubles; ++i) {
        if (lane(r, i) > 26.0) set_lane(y, i, extreme_quantile(-lane(tail, i)));
    }
    return outside ? (upper ? y : -y) : x;
}

// --- Intervals

FLAME_INLINE double log_ndtr(double x) {
    if (x > -25.0) return ::log(0.5 * ::erfc(-x * kSqrtHalf));
    return -0.5 * x * x - ::log(-x) - kHalfLog2Pi + log_mills_correction(-x);
}

// What all draws from one interval share, in double per coordinate.
struct TruncatedInterval {
    double log_upper;  // log Phi(upper)
    double p_upper;    // Phi(upper)
    double ratio;      // Phi(lower) / Phi(upper)
    double lower;
    double upper;
    double sign;  // -1 where reflected: then u -> 1 - u and x -> -x
};

FLAME_INLINE TruncatedInterval truncated_interval(double low, double high) {
    TruncatedInterval t{};
    const bool reflect = low + high > 0.0;
    t.sign = reflect ? -1.0 : 1.0;
    t.lower = reflect ? -high : low;
    t.upper = reflect ? -low : high;
    t.log_upper = log_ndtr(t.upper);
    t.p_upper = ::exp(t.log_upper);
    t.ratio = ::exp(log_ndtr(t.lower) - t.log_upper);
    return t;
}

// A draw by the uniform u in (0, 1); the arguments are what TruncatedInterval holds.
FLAME_INLINE vd truncated_draw(vd log_upper, vd p_upper, vd ratio, vd lower, vd upper, vd sign,
                               vd u) {
    const vd v = sign < 0.0 ? 1.0 - u : u;
    const vd mixed = v + (1.0 - v) * ratio;
    const vd log_p = log_upper + log_d(mixed);
    vd x = quantile_from_log(log_p, p_upper * mixed);
    x = x < lower ? lower : x;
    x = x > upper ? upper : x;
    return x * sign;
}

}  // namespace flame::FLAME_ISA
