// How many rows a block takes, and the shared memory it needs. Host side.
//
// Larger tiles read the weights fewer times, smaller ones fit smaller shared memories and spread
// few rows over more blocks. Results do not depend on the choice (product.h), except for the order
// in which LayerNorm's gain and offset gradients are added up.
#pragma once

#include <type_traits>

#include "check.h"
#include "cuda/launch.h"
#include "cuda/mlp_view.h"
#include "cuda/product.h"

namespace flame::FLAME_ISA {

struct TilePlan {
    int rows_per_warp;
    int samples;    // per tile; a sample is a row and its tangents
    int64_t tiles;  // per member
    int ld;         // floats from row to row in shared memory
    size_t shared;  // floats
};

static inline int widest_padded(const MlpSpec& spec) {
    int widest = 0;
    for (int l = 0; l <= spec.num_layers; ++l) {
        if (spec.sizes[l] > widest) widest = spec.sizes[l];
    }
    return padded(widest);
}

static inline TilePlan tile_plan(int rows_per_warp, int64_t samples, int group, int ld,
                                 size_t extra_per_row) {
    const int rows = kWarps * rows_per_warp;
    const int fit = rows / group;
    const size_t shared = rows * (2 * static_cast<size_t>(ld) + extra_per_row) + 2 * kSlabFloats;
    return {rows_per_warp, fit, fit > 0 ? (samples + fit - 1) / fit : 0, ld, shared};
}

// For `samples` samples of `group` rows each. extra_per_row: floats of shared memory that the
// kernel wants beyond its tile.
static inline TilePlan plan_tiles(const Launcher& launch, const MlpSpec& spec, int64_t samples,
                                  int group, size_t extra_per_row, int blocks_per_tile = 1,
                                  int least_ld = 0) {
    constexpr int64_t kEnoughBlocks = 128;  // about one for each multiprocessor of a large device
    constexpr int kChoices[] = {8, 4, 2};
    const int widest = widest_padded(spec);
    const int ld = widest > least_ld ? widest : least_ld;
    TilePlan best{};
    for (const int rows_per_warp : kChoices) {
        const TilePlan plan = tile_plan(rows_per_warp, samples, group, ld, extra_per_row);
        if (plan.samples == 0 || plan.shared > launch.shared_limit()) continue;
        best = plan;
        if (rows_per_warp <= 4 || plan.tiles * blocks_per_tile >= kEnoughBlocks) break;
    }
    const TilePlan least = tile_plan(2, samples, group, ld, extra_per_row);
    check(best.samples > 0, "a network whose widest layer has ", ld, " columns and ", group - 1,
          " tangents needs ", least.shared * sizeof(float),
          " bytes of shared memory and a tile of ", group, " rows; this device has ",
          launch.shared_limit() * sizeof(float), " bytes and tiles of up to ", 8 * kWarps,
          " rows: use narrower layers or backend='torch'");
    return best;
}

// body(std::integral_constant<int, rows_per_warp>)
template <typename Body>
void with_rows(const TilePlan& plan, Body&& body) {
    switch (plan.rows_per_warp) {
        case 8:
            return body(std::integral_constant<int, 8>{});
        case 4:
            return body(std::integral_constant<int, 4>{});
        default:
            return body(std::integral_constant<int, 2>{});
    }
}

}  // namespace flame::FLAME_ISA
