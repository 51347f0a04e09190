// Critics on tiles of candidate rows. The first layer is linear in its input blocks, so the
// observation's part is computed once per state and the K candidates of a state start from it.
#pragma once

#include "cpu/mlp_tile.h"

namespace flame::FLAME_ISA {

// Critics ready for candidate tiles: obs_part (members, states, width) holds W_s s + b.
struct CandidateCritics {
    const PackedMlp* packed;
    Activation activation;
    int action_dim;
    int width;
    int64_t states;
    const float* obs_part;
};

static inline CandidateCritics prepare_critics(const MlpSpec& spec, const PackedMlp& packed,
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

// q[i] = Q_m(state_of_row(i), actions[i]) for `rows` candidates of consecutive flat index, where
// flat index = state * candidates + k and the first row has index `first`.
template <typename Act>
static inline void candidate_q_tile(const CandidateCritics& critics, int m, int64_t first,
                                    int candidates, int rows, const float* actions,
                                    ptrdiff_t action_ld, const TileBuffers& tile, float* q) {
    const PackedLayer* layers = critics.packed->layers[m];
    const int last = critics.packed->num_layers - 1;
    const float* part = critics.obs_part + m * critics.states * critics.width;
    for (int i = 0; i < rows; ++i) tile.init[i] = part + (first + i) / candidates * critics.width;
    gemm_packed(rows, layers[0].out, 0, critics.action_dim, layers[0].in, actions, action_ld,
                layers[0].forward, tile.init, tile.x, tile.ld);
    if (last == 0) {
        for (int i = 0; i < rows; ++i) q[i] = tile.x[i * tile.ld];
        return;
    }
    const float* h = finish_tile<Act>(layers, last + 1, true, rows, tile);
    // One output: a dot product per row wastes no columns of a register tile.
    const PackedLayer& output = layers[last];
    float weight[kMaxWidth];
    for (int k = 0; k < output.in; ++k) weight[k] = output.forward[k * kGemmCols];
    for (int i = 0; i < rows; ++i) q[i] = dot(h + i * tile.ld, weight, output.in) + output.bias[0];
}

// lowest <- min(lowest, q), or q itself for the first member. A NaN of any member must show: it
// neither compares less nor is it replaced.
FLAME_INLINE void take_minimum(bool first, int rows, const float* q, float* lowest) {
    for (int i = 0; i < rows; ++i) {
        const bool take = first || q[i] < lowest[i] || q[i] != q[i];
        if (take) lowest[i] = q[i];
    }
}

}  // namespace flame::FLAME_ISA
