// Argument structs of the training kernels (csrc/cpu/*). Conventions of api.h; in addition
// `parameters` and `gradients` are flat buffers laid out as mlp_spec.h says, and a kernel ADDS to
// `gradients`.
#pragma once

#include <stdint.h>

#include "mlp_spec.h"
#include "time_features.h"

namespace flame {

// output[m, b, :] = MLP_m(input[b, :])
struct MlpForwardArgs {
    MlpSpec spec;
    const float* parameters;
    int64_t rows;
    const float* input;  // (rows, in)
    int64_t input_ld;
    float* output;  // (members, rows, out)
};

// A forward pass that can be differentiated by its parameters and first inputs.
struct MlpRecordArgs {
    MlpForwardArgs forward;
    int32_t input_columns;  // leading inputs with a gradient, 0 for none
};

// The gradient of sum_mb d_output[m, b] . output[m, b]. Every instruction set's MlpTape starts with
// its own backward, which knows its layouts.
struct MlpTape;
struct MlpBackwardArgs {
    MlpTape* tape;
    const float* d_output;  // (members, rows, out)
    float* gradients;       // what is added to, or null
    float* d_input;         // (rows, input_columns), overwritten, or null
};
struct MlpTape {
    void (*backward)(const MlpBackwardArgs& args);
    int64_t rows;
    int32_t input_columns;
    int64_t parameter_count;
};

// Features g(a, zs) of a pair that critics see beside the action: their action columns are
// [action | features], and zs are the last columns of their observation.
struct PairEncoder {
    MlpSpec spec;  // inputs [action (A) | zs (Z)], Z outputs, one member
    const float* parameters;
};

// Z, or 0 where critics see the action alone.
static inline int pair_columns(const PairEncoder* pair) { return pair ? outputs(pair->spec) : 0; }

// Actions as critics take them: [action | features], or the action alone without a pair encoder.
struct SeenActions {
    const float* data;
    int64_t ld;
    int32_t columns;
};

// Rows of actions in states.
struct Pairs {
    int64_t rows;
    int32_t action_dim;
    const float* action;  // (rows, A)
    int64_t action_ld;
    int32_t obs_dim;
    const float* obs;  // (rows, O), zs the last columns of it
    int64_t obs_ld;
};

// Of the critics' inputs [action (A) | features (Z) | observation (O)], O.
static inline int obs_columns(const MlpSpec& critics, int action_dim, const PairEncoder* pair) {
    return critics.sizes[0] - action_dim - pair_columns(pair);
}

// Q of K candidate actions per state; input columns are [action (A) | observation (O)].
struct TwinQArgs {
    MlpSpec spec;
    const float* parameters;
    int64_t states;
    int32_t candidates;
    int32_t action_dim;
    const float* obs;  // (states, O)
    int64_t obs_ld;
    const float* actions;  // (states, K, A), dense
    float* q_min;          // (states, K)
    float* q_each;         // (members, states, K) or null
};

// sum_m mean_b (Q_m(s_b, a_b) - target_b)^2: adds its gradient, reports per member.
struct CriticStepArgs {
    MlpSpec spec;
    const float* parameters;
    float* gradients;
    int64_t rows;
    int32_t action_dim;
    const float* obs;  // (rows, O)
    int64_t obs_ld;
    const float* action;  // (rows, A)
    int64_t action_ld;
    const float* target;  // (rows)
    double* loss;         // (members)
    double* q_mean;       // (members)
    float* q;             // (members, rows) or null
};

// torch.optim.Adam without weight decay; `step` counts from 1.
struct AdamArgs {
    int64_t count;
    float* parameters;
    const float* gradients;
    float* first_moment;
    float* second_moment;
    int64_t step;
    double learning_rate;
    double beta1;
    double beta2;
    double epsilon;
};

// target <- target + tau (online - target)
struct SoftUpdateArgs {
    int64_t count;
    float* target;
    const float* online;
    float tau;
};

// Qmin(s, a) and its gradient with respect to the action.
struct QGradientArgs {
    MlpSpec spec;
    const float* parameters;
    int64_t rows;
    int32_t action_dim;
    const float* obs;  // (rows, O)
    int64_t obs_ld;
    const float* action;  // (rows, A)
    int64_t action_ld;
    float* q_min;     // (rows)
    float* gradient;  // (rows, A)
};

// mean_b |u - sg(v - (t - r) JVP)|^2, JVP = tangent of u along (v, dr = 0, dt = 1);
// the network's input columns are [z (A) | observation (O) | time features (kTimeFeatures)].
struct MeanFlowStepArgs {
    MlpSpec spec;
    const float* parameters;
    float* gradients;
    int64_t rows;
    int32_t action_dim;
    const float* obs;  // (rows, O)
    int64_t obs_ld;
    const float* z;         // (rows, A) dense, like the one below
    const float* velocity;  // v
    const float* r;         // (rows)
    const float* t;         // (rows)
    double* loss;           // one value
};

enum class Divergence : int32_t { kNone = 0, kLogDet = 1, kTrace = 2, kProbe = 3 };

// Carries noise through z <- z + scale_i u(z, time_i, s), i < steps, and measures the density of
// the result: log N(noise) minus, per step, log|det(I + scale J)| (kLogDet), scale tr J (kTrace) or
// scale probe' J probe (kProbe).
struct FlowDensityArgs {
    MlpSpec spec;
    const float* parameters;
    int64_t states;
    int32_t samples;  // per state; rows = states * samples
    int32_t action_dim;
    const float* obs;  // (states, O)
    int64_t obs_ld;
    const float* noise;  // (rows, A) dense
    int32_t steps;
    int32_t time_features;
    const float* time;   // (steps, time_features)
    const float* scale;  // (steps)
    Divergence divergence;
    const float* probe;  // (rows, A) for kProbe
    float* action;       // (rows, A)
    float* log_prob;     // (rows)
    bool* folded;        // (rows): the product of the steps' determinants is negative
    float* transport;    // (rows, A, A) d action / d noise = I + q J; recorded passes only
};

// Adds the gradient of sum_b (d_action_b . a_b + d_log_prob_b log pi_b + d_transport_b . M_b) to
// `gradients`.
struct FlowTape;
struct FlowBackwardArgs {
    FlowTape* tape;
    float* gradients;
    const float* d_action;     // (rows, A)
    const float* d_log_prob;   // (rows)
    const float* d_transport;  // (rows, A, A) or null
};

// What every instruction set's FlowTape starts with: its own backward, which knows its layouts.
struct FlowTape {
    void (*backward)(const FlowBackwardArgs& args);
    int64_t rows;
    int32_t action_dim;
    int64_t parameter_count;
};

// How the uniforms of a state's K candidates are drawn.
enum class Candidates : int32_t { kGiven = 0, kRandom = 1, kStratified = 2 };

// v_hat = sum_k w_k (eps_k - a_k), w = softmax(Qmin(s, a_k) / alpha), over reverse candidates of
// z = signal a + scale eps (FLAME, Sec. 4.1). Candidate k's coordinate j of state b uses uniform
// (b K + k) A + j of `uniform` or of the Philox stream; kStratified makes a Latin hypercube of it,
// the stratum being the rank of the same draw of stream + 2 among those of the K candidates.
struct ReweightedArgs {
    MlpSpec spec;
    const float* parameters;
    const PairEncoder* pair;  // or null
    int64_t states;
    int32_t candidates;
    int32_t action_dim;
    const float* obs;  // (states, O)
    int64_t obs_ld;
    const float* z;       // (states, A) dense
    const float* signal;  // (states)
    const float* scale;   // (states), positive
    double alpha;
    Candidates source;
    const float* uniform;  // (states, K, A) for kGiven
    uint64_t seed;
    uint64_t stream;
    uint64_t offset;
    float* velocity;  // (states, A)
    float* ess;       // (states), 1 / sum_k w_k^2
};

// Draws from N(0, 1) truncated to [low, high] by the inverse distribution function.
struct TruncatedNormalArgs {
    int64_t count;
    const float* low;
    const float* high;
    const float* uniform;
    float* output;
};

}  // namespace flame
