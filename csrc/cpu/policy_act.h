// Acting: base noise and observations to actions, optionally the best of N by the smallest critic.
// Plain data shared by packed_policy.cpp (checks, threads), pack.cpp and policy_act_kernel.cpp.
#pragma once

#include <stdint.h>

#include "api.h"
#include "partition.h"
#include "scalar_rules.h"

namespace flame {

constexpr int kBlock = 32;           // floats that widths and tensors are padded to
constexpr int kPanel = 64;           // outputs per weight panel; a layer's last panel has the rest
constexpr int kMaxHiddenLayers = 8;  // what one ActNet holds
constexpr int kActTileRows = 64;     // rows that go through all layers together, so they stay in L2

// n floats with their padding.
template <typename N>
static constexpr N padded(N n) {
    return round_up(n, static_cast<N>(kBlock));
}

// How weights are stored. Of bfloat16, 16 words of two hold each block of 32: word i has weight i
// in its lower half and weight 16 + i in the upper one, so that a shift and a mask make floats of
// them.
enum class Precision : int32_t { kFloat = 0, kHalf = 1, kBfloat = 2 };
constexpr int kBfloatWords = kBlock / 2;

// Weights of one layer, in the order in which they are read. Hidden layers: panel after panel of 64
// outputs, in each panel input after input, so that one row's pass is one stream; the last panel
// has what is left of the outputs, padded. Output layer: output after output, `inputs` padded.
// fp32, or ActTask::precision for the policy's; missing outputs and inputs are zero.
struct ActLayer {
    int32_t inputs;
    int32_t outputs;
    const void* weight;
    const float* bias;    // outputs, padded; zero for `obs`, unused for `action`
    const float* gain;    // LayerNorm, padded; null without
    const float* offset;  // likewise
};

// The first layer in two column blocks, so that the observation's part is computed once per state.
struct ActNet {
    ActLayer obs;
    ActLayer action;  // carries the first layer's LayerNorm
    ActLayer hidden[kMaxHiddenLayers - 1];
    ActLayer output;
    const float* first_bias;  // (steps, padded width of the first layer), time folded in
    int32_t num_hidden;       // layers in `hidden`, one less than the network's hidden layers
    Activation activation;
};

// One sampling step with the network's output u at z: a = p z + q u, clipped to [-1, 1] if `clip`;
// then z becomes m a + n z. A flow's step is (1, -dt, 1, 0), a denoising step uses all four.
struct ActStep {
    float p, q, m, n;
    bool clip;
};

FLAME_HD float after_step(const ActStep& s, float z, float u) {
    const float x = s.p * z + s.q * u;
    const float a = s.m * (s.clip ? into_box(x) : x);
    return s.n == 0.0f ? a : a + s.n * z;  // without a share of z not even its infinity or NaN
}

enum class PolicyKind : int32_t {
    kFlow = 0,      // z = noise, then `steps`, then clip to [-1, 1]
    kGaussian = 1,  // the network maps obs to (mean, raw log std); action = tanh(mean + std noise)
};

struct ActTask {
    const ActNet* policy;  // null: `action` is given and only q is computed
    const ActNet* critics;
    int32_t num_critics;
    PolicyKind kind;
    int32_t num_steps;
    const ActStep* steps;
    float log_std_min, log_std_max;
    Precision precision;  // of the weights of policy and state encoder
    int32_t width;        // widest hidden layer of all networks, padded
    // Learned embeddings: policy and critics take [observation | zs], critics [action | zsa].
    const ActNet* state_encoder;  // null without
    const ActNet* pair_encoder;
    int32_t embedding_dim;      // Z, 0 without
    float embedding_min_scale;  // zs is divided by its mean absolute value, or by this if less
    const float* obs;           // (num_states, obs_ld)
    int64_t obs_ld;
    int32_t obs_dim;
    int32_t action_dim;
    int64_t num_states;
    int64_t num_particles;
    const float* noise;  // (rows, action_dim), rows = num_states * num_particles; null: use `key`
    PhiloxKey key;       // draw i is element i of that matrix
    float* action;       // (rows, action_dim)
    float* q;            // (rows), smallest critic; null when not wanted
};

// Columns of the widest output, of embedded states and of embedded actions.
static inline int64_t act_output_columns(const ActTask& task) {
    const int64_t columns = 2 * task.action_dim;
    return columns < task.embedding_dim ? task.embedding_dim : columns;
}
static inline int64_t act_state_columns(const ActTask& task) {
    return task.embedding_dim > 0 ? task.obs_dim + task.embedding_dim : 0;
}
static inline int64_t act_seen_columns(const ActTask& task) {
    return task.embedding_dim > 0 ? task.action_dim + task.embedding_dim : 0;
}

// Floats of workspace that one thread needs: four hidden blocks, the output, and what embeddings
// are appended to.
static inline int64_t policy_act_workspace(const ActTask& task) {
    return static_cast<int64_t>(kActTileRows) * (4 * task.width + act_output_columns(task) +
                                                 act_state_columns(task) + act_seen_columns(task));
}

}  // namespace flame
