// output[m, b, :] = MLP_m(input[b, :]), every layer of a tile of rows in one launch.
//
// parameters: flat buffer (mlp_spec.h); input (rows, in) with row distance input_ld; output
// (members, rows, out) dense. All device memory of the caller; no workspace.
//
// Operations 2 rows sum(in out) per member. Critics 23 -> 3 x 256 -> 1, two members, 25600 rows:
// 14 GFLOP, floor 0.21 ms at 67 TFLOP/s; inputs and outputs 2.6 MB, 0.8 us at 3.35 TB/s; the 0.56
// MB of a member's weights come from L2 once per tile of 64 rows: 0.45 GB.
#pragma once

#include "cpu/training.h"
#include "cuda/mlp_tile.h"
#include "cuda/tile_plan.h"
#include "partition.h"

namespace flame::FLAME_ISA {

template <int kRowsPerWarp>
struct MlpForwardKernel {
    static constexpr const char* kName = "mlp_forward";
    MlpView net;
    MlpForwardArgs a;
    int64_t tiles;
    TileLds lds;

    FLAME_BODY void operator()(const Block& block) const {
        auto tile = make_tile<kRowsPerWarp>(block, lds);
        const int member = static_cast<int>(block.index / tiles);
        const int64_t first = block.index % tiles * tile.kRows;
        const int rows = row_count(first, a.rows, tile.kRows);
        load_rows(block, tile, rows, net.layers[0].in,
                  [&](int r, int c) { return a.input[(first + r) * a.input_ld + c]; });
        forward_tile(block, tile, net, member, rows, 0, NoTape{});
        const int out = net.layers[net.num_layers - 1].out;
        float* to = a.output + (member * a.rows + first) * out;
        block.each_warp([&](const Warp& warp) {
            for (int r = warp.index; r < rows; r += kWarps) {
                warp.each(out, [&](int c) { to[r * out + c] = tile.x[r * tile.ld + c]; });
            }
        });
    }
};

static inline void mlp_forward(const Launcher& launch, const MlpForwardArgs& a) {
    if (a.rows == 0) return;
    const TilePlan plan = plan_tiles(launch, a.spec, {a.rows, 1, a.spec.members});
    with_rows(plan, [&](auto rows) {
        const MlpForwardKernel<decltype(rows)::value> kernel{make_view(a.spec, a.parameters), a,
                                                             plan.tiles, plan.lds};
        launch(kernel, plan.tiles * a.spec.members, plan.shared);
    });
}

}  // namespace flame::FLAME_ISA
