// From the flat parameter buffer to the panels that policy_act_kernel.cpp streams.
#pragma once

#include <cstdint>

#include "cpu/policy_act.h"
#include "packed_policy.h"

namespace flame {

struct PackShape {
    int action_dim;    // leading input columns, taken per row
    int obs_dim;       // then these, taken per state
    int num_features;  // then these, constant per step and folded into the first bias
    int outputs;
    Precision precision;
};

// Expected floats of the flat buffer.
int64_t flat_size(const NetDesc& net, const PackShape& shape);

// Floats of storage for one member's weights, biases and norms, with `steps` first biases.
int64_t packed_floats(const NetDesc& net, const PackShape& shape, int64_t steps);

// Packs member `member` into storage (zero-filled, 64-byte aligned), which the result points into.
// features: (steps, num_features).
ActNet pack_net(const NetDesc& net, const PackShape& shape, int member, const float* features,
                int64_t steps, float* storage);

// Nearest IEEE half or bfloat16 (ties to even); the caller has checked the range.
uint16_t to_half(float x);
uint16_t to_bfloat(float x);

}  // namespace flame
