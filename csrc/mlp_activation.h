// Hidden activations with the first and second derivatives that training needs: on vectors for
// the CPU's instruction sets, on single floats for CUDA (cuda/scalar.h), from the same formulas.
//
// mish(x) = x tanh(softplus(x)) = x n / (n + 2) with n = e (e + 2), e = exp(x): one exponential and
// one division. n / (n + 2) is formed before the product, because x n would overflow. Beyond x = 20
// the quotient is 1 in float32; below -87 exp would leave the normal range.
#pragma once

#include "api.h"
#include "lanes.h"

namespace flame::FLAME_ISA {

// NaN passes through: max and min return their second operand when either is NaN.
FLAME_INLINE vf at_least(float low, vf x) { return max(splat(low), x); }
FLAME_INLINE vf at_most(float high, vf x) { return min(splat(high), x); }

// value(x) = f(x); first(x, d) also gives d = f'(x); second(x, d, dd) also dd = f''(x).
template <Activation kActivation>
struct HiddenActivation;

template <>
struct HiddenActivation<Activation::kRelu> {
    FLAME_INLINE vf value(vf x) { return x < 0.0f ? zero() : x; }
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
FLAME_INLINE void with_activation(Activation activation, Body&& body) {
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
