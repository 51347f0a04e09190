#include "tanh_gaussian.h"

#include <cmath>

#include "scalar_rules.h"
#include "thread_pool.h"

namespace flame {
namespace {

// tanh(x) from e = exp(-2 |x|), which never overflows: |tanh| = (1 - e) / (1 + e), and
// 1 - tanh^2 = 4 e / (1 + e)^2 keeps its digits where tanh is next to one.
struct Tanh {
    explicit Tanh(float x)
        : e(std::exp(-2.0f * std::fabs(x))),
          value(std::copysign((1.0f - e) / (1.0f + e), x)),
          slope(4.0f * e / ((1.0f + e) * (1.0f + e))) {}
    float e;
    float value;
    float slope;
};

struct Coordinate {
    Coordinate(const TanhGaussian& p, int64_t row, int j)
        : half_range(0.5f * (p.log_std_max - p.log_std_min)),
          noise(p.noise[row * p.action_dim + j]),
          raw(p.output[(2 * row + 1) * p.action_dim + j]),
          log_std(p.log_std_min + half_range * (raw.value + 1.0f)),
          std(std::exp(log_std)),
          pre_tanh(p.output[2 * row * p.action_dim + j] + std * noise),
          action(pre_tanh) {}
    float half_range;
    float noise;
    Tanh raw;
    float log_std;
    float std;
    float pre_tanh;
    Tanh action;
};

// body(row) for all rows, in parallel from a few microseconds of work on.
template <typename Body>
void for_rows(int64_t rows, Body&& body) {
    parallel_for(rows, 16, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) body(b);
    });
}

}  // namespace

void tanh_gaussian(const TanhGaussian& p, float* action, float* log_prob) {
    const double log_two = 0.69314718055994530942;
    for_rows(p.rows, [&](int64_t b) {
        double sum = 0.0;
        // log(1 - tanh(x)^2) = 2 (log 2 - |x| - log(1 + e)).
        for (int j = 0; j < p.action_dim; ++j) {
            const Coordinate c(p, b, j);
            action[b * p.action_dim + j] = c.action.value;
            const double log_slope = 2.0 * (log_two - std::fabs(static_cast<double>(c.pre_tanh)) -
                                            std::log1p(static_cast<double>(c.action.e)));
            const double noise = static_cast<double>(c.noise);
            const double log_std = static_cast<double>(c.log_std);
            sum -= 0.5 * noise * noise + kHalfLog2Pi + log_std + log_slope;
        }
        log_prob[b] = static_cast<float>(sum);
    });
}

void tanh_gaussian_gradient(const TanhGaussian& p, const float* d_action, const float* d_log_prob,
                            float* d_output) {
    for_rows(p.rows, [&](int64_t b) {
        for (int j = 0; j < p.action_dim; ++j) {
            const Coordinate c(p, b, j);
            // d log pi / d x = 2 tanh(x) through the slope, d log pi / d log std = -1.
            const float d_pre_tanh = d_action[b * p.action_dim + j] * c.action.slope +
                                     d_log_prob[b] * 2.0f * c.action.value;
            const float d_log_std = d_pre_tanh * c.std * c.noise - d_log_prob[b];
            d_output[2 * b * p.action_dim + j] = d_pre_tanh;
            d_output[(2 * b + 1) * p.action_dim + j] = d_log_std * c.half_range * c.raw.slope;
        }
    });
}

}  // namespace flame
