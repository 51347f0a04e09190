// State-action learned embeddings by the CPU kernels: what flame_ext/embeddings.py writes down.
#pragma once

#include <stdint.h>

#include "cpu/training.h"
#include "cpu/workspace.h"

namespace flame {

// f: its outputs, divided by their mean absolute value, are a state's embedding zs.
struct StateEncoder {
    MlpSpec spec;  // inputs: observation (O), Z outputs, one member
    const float* parameters;
    float min_scale;  // what is divided by is not less
};

// observed (rows, O + Z) = [obs | zs]
struct Observe {
    StateEncoder encoder;
    int64_t rows;
    const float* obs;  // (rows, O), rows `obs_ld` apart
    int64_t obs_ld;
    float* observed;
};
void observe(const Observe& args);

// What has to be written lies in `workspace`.
SeenActions seen_actions(const PairEncoder* encoder, const Pairs& pairs, Workspace& workspace);

// The same with what leads gradients back: recorded in `memory`, null without an encoder.
struct RecordedPairs {
    SeenActions seen;
    MlpTape* tape;
};
RecordedPairs record_pairs(const PairEncoder* encoder, const Pairs& pairs, Workspace& memory);
// With an encoder: by_action (rows, A) from the gradient with respect to the seen actions, dense.
void pair_gradient(const RecordedPairs& recorded, const Pairs& pairs, const float* by_seen,
                   float* by_action);

// mean (g(f(s), a) - sg(f(s')))^2: adds the gradients of f and g, returns the loss.
struct EncoderStep {
    StateEncoder state;
    PairEncoder pair;
    float* state_gradients;
    float* pair_gradients;
    int64_t rows;
    const float* obs;  // (rows, O), rows `obs_ld` apart
    int64_t obs_ld;
    const float* action;  // (rows, A)
    int64_t action_ld;
    const float* next_obs;  // (rows, O)
    int64_t next_obs_ld;
};
double encoder_step(const EncoderStep& args);

}  // namespace flame
