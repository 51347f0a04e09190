// The network's embedding of a time interval [r, t]: sin w t, cos w t, sin w (t - r), cos w (t - r)
// for kFrequencies values of w. flame_ext/sampling.py has the same table.
#pragma once

#include <math.h>

#include "philox.h"

namespace flame {

constexpr int kTimeFeatures = 32;
constexpr int kFrequencies = kTimeFeatures / 4;

struct TimeFeature {
    float value;
    float derivative;  // along t
};

// Column `c` of the embedding.
FLAME_HD TimeFeature time_feature(int c, float t, float r) {
    const float w = static_cast<float>(0.5 + c % kFrequencies * (2.5 / (kFrequencies - 1)));
    const int part = c / kFrequencies;
    const float angle = mul_rn(part < 2 ? t : t - r, w);
    if (part % 2 == 0) return {sinf(angle), w * cosf(angle)};
    return {cosf(angle), -w * sinf(angle)};
}

}  // namespace flame
