// Hidden activations on vectors, with the first and second derivatives that training needs.
//
// mish(x) = x tanh(softplus(x)) = x n / (n + 2) with n = e (e + 2), e = exp(x): one exponential and
// one division. n / (n + 2) is formed before the product, because x n would overflow. Beyond x = 20
// the quotient is 1 in float32; below -87 exp would leave the normal range.
#pragma once

#include "api.h"
#include "cpu/simd.h"

namespace flame::FLAME_ISA {

// exp(x) for -87 <= x <= 88, relative error below 2e-7: 2^k 2^f with k the nearest integer to
// x / ln 2 and a minimax polynomial on |f| <= 1/2 (coefficients fitted for this file). The range
// reduction needs a fused multiply-add; without one simd.h's two-step reduction is used.
FLAME_INLINE vf exp_bounded(vf x) {
#if defined(FLAME_ISA_AVX2) || defined(FLAME_ISA_AVX512)
    const vf shift = splat(12582912.0f);  // 1.5 * 2^23: rounds to an integer in the low bits
    const vf log2e = splat(1.44269502f);
    const vf t = fma(x, log2e, shift);
    const vf k = t - shift;
    const vf f = fma(x, splat(1.92596299e-8f), fma(x, log2e, -k));
    vf p = splat(1.5345811897e-4f);
    p = fma(p, f, splat(1.3399931218e-3f));
    p = fma(p, f, splat(9.6184889575e-3f));
    p = fma(p, f, splat(5.5503287770e-2f));
    p = fma(p, f, splat(2.4022646891e-1f));
    p = fma(p, f, splat(6.9314720574e-1f));
    p = fma(p, f, splat(1.0f));
    // The low bits of t are k; adding them to the exponent multiplies by 2^k.
    return reinterpret_cast<vf>(reinterpret_cast<vi>(p) + (reinterpret_cast<vi>(t) << 23));
#else
    return exp(x);
#endif
}

// NaN passes through: max and min return their second operand when either is NaN.
FLAME_INLINE vf at_least(float low, vf x) { return max(splat(low), x); }
FLAME_INLINE vf at_most(float high, vf x) { return min(splat(high), x); }

// value(x) = f(x); first(x, d) also gives d = f'(x); second(x, d, dd) also dd = f''(x).
template <Activation kActivation>
struct HiddenActivation;

template <>
struct HiddenActivation<Activation::kRelu> {
    FLAME_INLINE vf value(vf x) { return relu(x); }
    FLAME_INLINE vf first(vf x, vf& d) {
        d = x > 0.0f ? splat(1.0f) : zero();
        return value(x);
    }
    FLAME_INLINE vf second(vf x, vf& d, vf& dd) {
        dd = zero();
        return first(x, d);
    }
};

template <>
struct HiddenActivation<Activation::kSilu> {
    FLAME_INLINE vf sigmoid(vf x) {
        const vf e = exp_bounded(at_least(-87.0f, at_most(87.0f, x)));
        return e / (e + splat(1.0f));
    }
    FLAME_INLINE vf value(vf x) { return at_least(-87.0f, x) * sigmoid(x); }
    FLAME_INLINE vf first(vf x, vf& d) {
        vf dd;
        return second(x, d, dd);
    }
    FLAME_INLINE vf second(vf x, vf& d, vf& dd) {
        const vf one = splat(1.0f);
        const vf s = sigmoid(x);
        const vf slope = s * (one - s);
        const vf bounded = at_least(-87.0f, at_most(87.0f, x));
        d = fma(bounded, slope, s);
        dd = slope * fma(bounded, fma(splat(-2.0f), s, one), splat(2.0f));
        return at_least(-87.0f, x) * s;
    }
};

template <>
struct HiddenActivation<Activation::kMish> {
    FLAME_INLINE vf value(vf x) {
        const vf low = at_least(-87.0f, x);
        const vf e = exp_bounded(at_most(20.0f, low));
        const vf n = e * (e + splat(2.0f));
        return low * (n / (n + splat(2.0f)));
    }
    FLAME_INLINE vf first(vf x, vf& d) {
        vf dd;
        return second(x, d, dd);
    }
    // w = tanh(softplus(x)) = n / (n + 2), s = sigmoid(x) = e / (1 + e), w' = (1 - w^2) s with
    // 1 - w = 2 / (n + 2): f' = w + x w', f'' = w' (2 + x (1 - s - 2 w s)).
    FLAME_INLINE vf second(vf x, vf& d, vf& dd) {
        const vf one = splat(1.0f);
        const vf two = splat(2.0f);
        const vf low = at_least(-87.0f, x);
        const vf bounded = at_most(20.0f, low);
        const vf e = exp_bounded(bounded);
        const vf n = e * (e + two);
        // One division for both quotients: 1 / ((n + 2) (1 + e)).
        const vf np2 = n + two;
        const vf ep1 = e + one;
        const vf inverse = one / (np2 * ep1);
        const vf w = n * (inverse * ep1);
        const vf s = e * (inverse * np2);
        const vf slope = two * (inverse * ep1) * (one + w) * s;
        d = fma(bounded, slope, w);
        dd = slope * fma(bounded, one - s - two * w * s, two);
        return low * w;
    }
};

// Calls body(HiddenActivation<...>{}) for the run-time choice.
template <typename Body>
static inline void with_activation(Activation activation, Body&& body) {
    switch (activation) {
        case Activation::kRelu:
            return body(HiddenActivation<Activation::kRelu>{});
        case Activation::kSilu:
            return body(HiddenActivation<Activation::kSilu>{});
        case Activation::kMish:
            return body(HiddenActivation<Activation::kMish>{});
    }
}

}  // namespace flame::FLAME_ISA
