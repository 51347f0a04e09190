// How many rows a block takes, and the shared memory it needs. Host side.
//
// Larger tiles read the weights fewer times, smaller ones fit smaller shared memories and spread
// few rows over more blocks. Results do not depend on the choice (product.h), except for the order
// in which LayerNorm's gain and offset gradients are added up.
#pragma once

#include <type_traits>

#include "check.h"
#include "cuda/launch.h"
#include "cuda/mlp_tile.h"
#include "partition.h"

namespace flame::FLAME_ISA {

struct TilePlan {
    int rows_per_warp;
    int samples;    // per tile; a sample is a row and its tangents
    int64_t tiles;  // per member
    TileLds lds;
    size_t shared;  // floats
    bool tensor_cores;
};

// What a kernel asks of its tiles.
struct TileDemand {
    int64_t samples;
    int group = 1;          // rows per sample: itself and its tangents
    int members = 1;        // blocks per tile
    int extra_per_row = 0;  // floats of shared memory beyond the tile
    int least_ld = 0;       // of either buffer
    bool tensor_cores = false;
};

static inline TileLds tile_lds(const MlpSpec& spec, const TileDemand& want) {
    int second = padded(want.least_ld);
    for (int l = 1; l <= spec.num_layers; ++l) {
        if (padded(spec.sizes[l]) > second) second = padded(spec.sizes[l]);
    }
    const int input = padded(spec.sizes[0]);
    const int first = input > second ? input : second;
    if (want.tensor_cores) return {tensor_ld(first), tensor_ld(second)};
    return {first, second};
}

static inline TilePlan tile_plan(int rows_per_warp, const TileDemand& want, const TileLds& lds) {
    const int rows = kWarps * rows_per_warp;
    const int fit = rows / want.group;
    const size_t per_row = static_cast<size_t>(lds.first) + lds.second + want.extra_per_row;
    return {rows_per_warp,
            fit,
            fit > 0 ? divide_up(want.samples, fit) : 0,
            lds,
            rows * per_row + slab_floats(want.tensor_cores),
            want.tensor_cores};
}

static inline TilePlan plan_tiles(const Launcher& launch, const MlpSpec& spec,
                                  const TileDemand& want) {
    constexpr int64_t kEnoughBlocks = 128;  // about one for each multiprocessor of a large device
    constexpr int kChoices[] = {8, 4, 3, 2};
    const TileLds lds = tile_lds(spec, want);
    TilePlan best{};
    for (const int rows_per_warp : kChoices) {
        if (want.tensor_cores && kWarps * rows_per_warp % kMmaRows != 0) continue;
        const TilePlan plan = tile_plan(rows_per_warp, want, lds);
        if (plan.samples == 0 || plan.shared > launch.shared_limit()) continue;
        best = plan;
        if (rows_per_warp <= 4 || plan.tiles * want.members >= kEnoughBlocks) break;
    }
    const TilePlan least = tile_plan(2, want, lds);
    check(best.samples > 0, "layers of up to ", lds.first, " columns need ",
          least.shared * sizeof(float), " bytes of shared memory for ", 2 * kWarps,
          " rows, and a sample with its tangents takes ", want.group, " of at most ", 8 * kWarps,
          " rows; this device has ", launch.shared_limit() * sizeof(float),
          " bytes: use narrower layers or backend='torch'");
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
        case 3:
            return body(std::integral_constant<int, 3>{});
        default:
            return body(std::integral_constant<int, 2>{});
    }
}

// body(std::integral_constant<int, rows_per_warp>, std::bool_constant<tensor_cores>)
template <typename Body>
void with_tile(const TilePlan& plan, Body&& body) {
    if (!plan.tensor_cores) {
        return with_rows(plan, [&](auto rows) { body(rows, std::false_type{}); });
    }
    switch (plan.rows_per_warp) {
        case 8:
            return body(std::integral_constant<int, 8>{}, std::true_type{});
        case 4:
            return body(std::integral_constant<int, 4>{}, std::true_type{});
        default:
            return body(std::integral_constant<int, 2>{}, std::true_type{});
    }
}

}  // namespace flame::FLAME_ISA
