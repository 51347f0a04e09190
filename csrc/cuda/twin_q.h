// Qmin(s, a_k) of K candidate actions per state. The first layer is linear in its input blocks, so
// the observation's part is computed once per state (a launch of its own) and candidates start from
// it.
//
// obs (states, O), actions (states, K, A) dense, q_min (states, K), q_each (members, states, K) or
// null: device memory of the caller. Workspace: (members, states, width of layer one) floats.
//
// Operations per member 2 B K (A h + (L - 2) h^2 + h) + 2 B O h. B 256, K 100, A 6, O 17, 3 x 256,
// two members: 13.6 GFLOP, floor 0.20 ms at the 67 TFLOP/s of FFMA, 0.13 ms at the 102 of
// tensor_product.h, which takes the candidates' products where tensor cores are asked for. Bytes:
// candidates and Q 0.7 MB, observation parts 0.5 MB written and read through L2.
#pragma once

#include "cpu/training.h"
#include "cuda/mlp_tile.h"
#include "cuda/tile_plan.h"
#include "partition.h"
#include "scalar_rules.h"

namespace flame::FLAME_ISA {

// part[m, s, :] = W_obs s + b of layer one.
template <int kRowsPerWarp>
struct ObservationPartKernel {
    static constexpr const char* kName = "observation_part";
    MlpView net;
    TwinQArgs a;
    float* part;
    int64_t tiles;
    TileLds lds;

    FLAME_BODY void operator()(const Block& block) const {
        auto tile = make_tile<kRowsPerWarp>(block, lds);
        const int member = static_cast<int>(block.index / tiles);
        const int64_t first = block.index % tiles * tile.kRows;
        const int rows = row_count(first, a.states, tile.kRows);
        const LayerView layer = member_layer(net, 0, member);
        const int obs_dim = layer.in - a.action_dim;
        load_rows(block, tile, rows, obs_dim,
                  [&](int r, int c) { return a.obs[(first + r) * a.obs_ld + c]; });
        const Operand<true> weight{layer.weight + a.action_dim, layer.in, obs_dim, layer.out};
        float* to = part + (member * a.states + first) * layer.out;
        multiply<kRowsPerWarp>(
            block, rows, tile.x, tile.ld, weight, tile.slab, [&](int r, int c, float sum) {
                to[static_cast<int64_t>(r) * layer.out + c] = sum + layer.bias[c];
            });
    }
};

// Candidates are rows in their flat order (state, k). Members take turns in a block, which keeps
// their minimum.
template <int kRowsPerWarp, bool kTensorCores>
struct TwinQKernel {
    static constexpr const char* kName = "twin_q";
    MlpView net;
    TwinQArgs a;
    const float* part;
    TileLds lds;

    FLAME_BODY void operator()(const Block& block) const {
        constexpr int kRows = Tile<kRowsPerWarp>::kRows;
        const int64_t total = a.states * a.candidates;
        const int64_t first = block.index * kRows;
        const int rows = row_count(first, total, kRows);
        // One division per row here instead of one per output of the first layer.
        const int64_t first_state = first / a.candidates;
        const int before = static_cast<int>(first % a.candidates);
        int* later =
            reinterpret_cast<int*>(make_tile<kRowsPerWarp, kTensorCores>(block, lds).extra);
        block.each_thread([&](int t) {
            if (t < rows) later[t] = (before + t) / a.candidates;
        });
        for (int m = 0; m < net.members; ++m) {
            auto tile = make_tile<kRowsPerWarp, kTensorCores>(block, lds);
            const LayerView layer = member_layer(net, 0, m);
            load_rows(block, tile, rows, a.action_dim,
                      [&](int r, int c) { return a.actions[(first + r) * a.action_dim + c]; });
            const float* from = part + (m * a.states + first_state) * layer.out;
            linear_from(block, tile, layer, a.action_dim, rows,
                        [&](int r, int c) { return from[later[r] * layer.out + c]; });
            forward_from_first(block, tile, net, m, rows, 0, NoTape{});
            block.each_thread([&](int t) {
                if (t < rows) keep(m, first + t, total, tile.x[t * tile.ld]);
            });
        }
    }

    FLAME_BODY void keep(int member, int64_t at, int64_t total, float q) const {
        if (member == 0 || takes_minimum(q, a.q_min[at])) a.q_min[at] = q;
        if (a.q_each != nullptr) a.q_each[member * total + at] = q;
    }
};

static inline float* carve_twin_q(const TwinQArgs& a, Carver& memory) {
    return memory.floats(static_cast<size_t>(a.spec.members) * a.states * a.spec.sizes[1]);
}

static inline void twin_q(const Launcher& launch, const TwinQArgs& a, bool tensor_cores,
                          Carver& memory) {
    float* part = carve_twin_q(a, memory);
    const int64_t total = a.states * a.candidates;
    if (total == 0) return;
    const MlpView net = make_view(a.spec, a.parameters);
    const TilePlan states = plan_tiles(launch, a.spec, {a.states, 1, a.spec.members});
    with_rows(states, [&](auto rows) {
        const ObservationPartKernel<decltype(rows)::value> kernel{net, a, part, states.tiles,
                                                                  states.lds};
        launch(kernel, states.tiles * a.spec.members, states.shared);
    });
    const TilePlan candidates = plan_tiles(launch, a.spec, {total, 1, 1, 1, 0, tensor_cores});
    with_tile(candidates, [&](auto rows, auto tensor) {
        using Kernel = TwinQKernel<decltype(rows)::value, decltype(tensor)::value>;
        const Kernel kernel{net, a, part, candidates.lds};
        launch(kernel, candidates.tiles, candidates.shared);
    });
}

}  // namespace flame::FLAME_ISA
