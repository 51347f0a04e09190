// What a state's features are divided by to be its embedding (SALE, Eq. 3).
#pragma once

#include "api.h"

namespace flame {

// Mean absolute value of n features, summed in double.
static inline double mean_absolute_value(const float* features, int n) {
    double sum = 0.0;
    for (int j = 0; j < n; ++j) sum += __builtin_fabs(static_cast<double>(features[j]));
    return sum / n;
}

// The same, but at least `min_scale`.
static inline float embedding_scale(const float* features, int n, float min_scale) {
    const double mean = mean_absolute_value(features, n);
    const auto least = static_cast<double>(min_scale);
    return static_cast<float>(mean > least ? mean : least);
}

}  // namespace flame
