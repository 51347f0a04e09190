// Networks of [action | state] on tiles of candidate rows. The first layer is linear in its input
// blocks, so the state's part is computed once per state and its K candidates start from it.
#pragma once

#include "cpu/mlp_tile.h"
#include "scalar_rules.h"

namespace flame::FLAME_ISA {

// A network ready for candidate tiles: state_part (members, states, width) holds W_s s + b.
struct CandidateNetwork {
    const PackedMlp* packed;
    Activation activation;
    int action_dim;
    int width;
    int64_t states;
    const float* state_part;
};

static inline CandidateNetwork prepare_candidates(const MlpSpec& spec, const PackedMlp& packed,
                                                  int action_dim, int64_t states, const float* obs,
                                                  int64_t obs_ld, Workspace& workspace) {
    const int width = widest_row(spec);
    float* part = workspace.floats(static_cast<size_t>(spec.members) * states * width);
    const RowCut cut = even_cut(states, kMaxTileRows);
    parallel_for(cut.chunks * spec.members, 1, [&](int64_t begin, int64_t end) {
        const float* init[kMaxTileRows];
        for (int64_t c = begin; c < end; ++c) {
            const int64_t m = c / cut.chunks;
            const auto [first, rows] = cut[c % cut.chunks];
            const PackedLayer& layer = packed.layers[m][0];
            fill_rows(init, rows, layer.bias, 0);
            gemm_packed(rows, layer.out, action_dim, layer.in - action_dim, layer.in,
                        obs + first * obs_ld, obs_ld, layer.forward, init,
                        part + (m * states + first) * width, width);
        }
    });
    return {&packed, spec.activation, action_dim, width, states, part};
}

// Candidates of consecutive flat index = state * candidates + k.
struct CandidateRows {
    int64_t first;
    int candidates;
    int rows;
    const float* actions;
    ptrdiff_t action_ld;
};

// The first layer's pre-activations of member m in tile.x.
static inline void first_layer_tile(const CandidateNetwork& network, int m, const CandidateRows& r,
                                    const TileBuffers& tile) {
    const PackedLayer& layer = network.packed->layers[m][0];
    const float* part = network.state_part + m * network.states * network.width;
    for (int i = 0; i < r.rows; ++i) {
        tile.init[i] = part + (r.first + i) / r.candidates * network.width;
    }
    gemm_packed(r.rows, layer.out, 0, network.action_dim, layer.in, r.actions, r.action_ld,
                layer.forward, tile.init, tile.x, tile.ld);
}

// The linear outputs of a network with one member, rows `tile.ld` apart.
template <typename Act>
static inline const float* candidate_output_tile(const CandidateNetwork& network,
                                                 const CandidateRows& r, const TileBuffers& tile) {
    first_layer_tile(network, 0, r, tile);
    return finish_tile<Act>(network.packed->layers[0], network.packed->num_layers, false, r.rows,
                            tile);
}

// q[i] = Q_m(state_of_row(i), actions[i])
template <typename Act>
static inline void candidate_q_tile(const CandidateNetwork& critics, int m, const CandidateRows& r,
                                    const TileBuffers& tile, float* q) {
    const PackedLayer* layers = critics.packed->layers[m];
    const int last = critics.packed->num_layers - 1;
    const int rows = r.rows;
    first_layer_tile(critics, m, r, tile);
    if (last == 0) {
        for (int i = 0; i < rows; ++i) q[i] = tile.x[i * tile.ld];
        return;
    }
    const float* h = finish_tile<Act>(layers, last + 1, true, rows, tile);
    // One output: a dot product per row wastes no columns of a register tile.
    const PackedLayer& output = layers[last];
    float weight[kMaxWidth];
    for (int k = 0; k < output.in; ++k) {
        weight[k] = packed_value(output.forward, output.in, k, 0);
    }
    for (int i = 0; i < rows; ++i) q[i] = dot(h + i * tile.ld, weight, output.in) + output.bias[0];
}

// lowest <- min(lowest, q), or q itself for the first member.
FLAME_INLINE void take_minimum(bool first, int rows, const float* q, float* lowest) {
    for (int i = 0; i < rows; ++i) {
        if (first || takes_minimum(q[i], lowest[i])) lowest[i] = q[i];
    }
}

}  // namespace flame::FLAME_ISA
