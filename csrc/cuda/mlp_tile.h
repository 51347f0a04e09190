// An MLP on a tile of rows that stays in shared memory through all layers.
//
// Rows come in groups of 1 + T: a sample's value and T forward tangents, which pass through the
// same products (without bias) and share the value's activation derivatives. T = 0 is the plain
// network. A tile holds as many whole groups as fit.
#pragma once

#include "cuda/mlp_view.h"
#include "cuda/product.h"
#include "cuda/tensor_product.h"
#include "mlp_activation.h"
#include "partition.h"

namespace flame::FLAME_ISA {

// Floats from row to row of a tile's two buffers: the first also takes the network's inputs.
struct TileLds {
    int first;
    int second;
};

// Two buffers: x (rows, ld) holds what the next layer reads, y (rows, ld_y) receives what it gives.
// kTensorCores: products by tensor_product.h, else by product.h; of the latter are `slab` and all
// passes that train.
template <int kRowsPerWarp, bool kTensorCores = false>
struct Tile {
    static constexpr int kRows = kWarps * kRowsPerWarp;
    float* x;
    float* y;
    float* slab;
    float* extra;  // what the plan asked for beyond the tile
    int ld;
    int ld_y;

    FLAME_BODY void swap() { *this = {y, x, slab, extra, ld_y, ld}; }
};

// Floats of shared memory for what a product streams.
static inline FLAME_ANYWHERE int slab_floats(bool tensor_cores) {
    return tensor_cores ? 0 : 2 * kSlabFloats;
}

template <int kRowsPerWarp, bool kTensorCores = false>
FLAME_INLINE Tile<kRowsPerWarp, kTensorCores> make_tile(const Block& block, const TileLds& lds) {
    constexpr int kRows = Tile<kRowsPerWarp>::kRows;
    float* y = block.shared + kRows * lds.first;
    float* slab = y + kRows * lds.second;
    return {block.shared, y, slab, slab + slab_floats(kTensorCores), lds.first, lds.second};
}

// x(row, column) = value(row, column), zero from `columns` to the padded end.
template <int kRowsPerWarp, bool kTensorCores, typename Value>
FLAME_INLINE void load_rows(const Block& block, const Tile<kRowsPerWarp, kTensorCores>& tile,
                            int rows, int columns, Value&& value) {
    block.each_warp([&](const Warp& warp) {
        for (int r = warp.index; r < rows; r += kWarps) {
            warp.each(padded(columns),
                      [&](int c) { tile.x[r * tile.ld + c] = c < columns ? value(r, c) : 0.0f; });
        }
    });
}

// --- Linear parts

// x <- W x + init(row, column) over the layer's first `depth` inputs.
template <int kRowsPerWarp, bool kTensorCores, typename Init>
FLAME_INLINE void linear_from(const Block& block, Tile<kRowsPerWarp, kTensorCores>& tile,
                              const LayerView& layer, int depth, int rows, Init&& init) {
    const Operand<true> weight{layer.weight, layer.in, depth, layer.out};
    const auto emit = [&](int r, int c, float sum) {
        tile.y[r * tile.ld_y + c] = sum + init(r, c);
    };
    if constexpr (kTensorCores) {
        constexpr int kRowTiles = Tile<kRowsPerWarp>::kRows / kMmaRows;
        tensor_multiply<kRowTiles>(block, rows, tile.x, tile.ld, weight, emit);
    } else {
        multiply<kRowsPerWarp>(block, rows, tile.x, tile.ld, weight, tile.slab, emit);
    }
    tile.swap();
}

// A few outputs: a dot product of a warp per row and output wastes no columns of a slab.
constexpr int kFewOutputs = 32;

template <int kRowsPerWarp, bool kTensorCores>
FLAME_INLINE void dot_outputs(const Block& block, Tile<kRowsPerWarp, kTensorCores>& tile,
                              const LayerView& layer, int rows, int group) {
    block.each_warp([&](const Warp& warp) {
        for (int r = warp.index; r < rows; r += kWarps) {
            const float* x = tile.x + r * tile.ld;
            for (int o = 0; o < layer.out; ++o) {
                const float* w = layer.weight + static_cast<int64_t>(o) * layer.in;
                const float sum = warp.sum(layer.in, [&](int c) { return x[c] * w[c]; });
                warp.each(1, [&](int) {
                    tile.y[r * tile.ld_y + o] = r % group == 0 ? sum + layer.bias[o] : sum;
                });
            }
        }
    });
    tile.swap();
}

// x <- W x, plus the bias in the rows of values.
template <int kRowsPerWarp, bool kTensorCores>
FLAME_INLINE void linear(const Block& block, Tile<kRowsPerWarp, kTensorCores>& tile,
                         const LayerView& layer, int rows, int group) {
    if (layer.out <= kFewOutputs) return dot_outputs(block, tile, layer, rows, group);
    linear_from(block, tile, layer, layer.in, rows,
                [&](int r, int c) { return r % group == 0 ? layer.bias[c] : 0.0f; });
}

// --- Hidden units

// What a backward pass will need: nothing of this pass, its values, or its tangents too.
enum class Record { kNothing, kValues, kTangents };

// That of one sample in one layer; rows in global memory, the tangents' (T) a distance ld apart.
struct TapeRow {
    float* h;
    float* slope;
    float* normed;  // LayerNorm only, like inverse_std
    float* inverse_std;
    float* curvature;  // of here on with tangents only
    float* tangent;    // before the activation; LayerNorm: before its gain
    float* along;      // (T) mean(xhat x'), LayerNorm only
    int ld;
};

// x' <- s (x' - mean x' - xhat mean(xhat x')), the tangent of LayerNorm before its gain; returns
// mean(xhat x').
FLAME_INLINE float normalise_tangent(const Warp& warp, float* dx, const float* x, int n, float mean,
                                     float inverse_std) {
    const float scale = 1.0f / static_cast<float>(n);
    const float shift = scale * warp.sum(n, [&](int c) { return dx[c]; });
    const float along =
        scale * warp.sum(n, [&](int c) { return (x[c] - mean) * inverse_std * dx[c]; });
    warp.each(n, [&](int c) {
        dx[c] = (dx[c] - shift - (x[c] - mean) * inverse_std * along) * inverse_std;
    });
    return along;
}

// Column c of one sample's tangents, below its value at x, through the activation.
template <Record kRecord>
FLAME_INLINE void activate_tangents(float* x, int ld, int c, int tangents, float slope,
                                    const TapeRow& tape) {
    for (int t = 1; t <= tangents; ++t) {
        float& dx = x[t * ld + c];
        if (kRecord == Record::kTangents) tape.tangent[(t - 1) * tape.ld + c] = dx;
        dx *= slope;
        if (kRecord == Record::kTangents) tape.h[t * tape.ld + c] = dx;
    }
}

// One sample's linear outputs x (and its tangents below it) through LayerNorm and activation.
template <typename Act, Record kRecord>
FLAME_INLINE void activate_sample(const Warp& warp, const LayerView& layer, float* x, int ld,
                                  int tangents, const TapeRow& tape) {
    constexpr bool kValues = kRecord != Record::kNothing;
    constexpr bool kTangents = kRecord == Record::kTangents;
    const int n = layer.out;
    float mean = 0.0f;
    float inverse_std = 1.0f;
    if (layer.gain != nullptr) {
        const float count = static_cast<float>(n);
        mean = warp.sum(n, [&](int c) { return x[c]; }) / count;
        const float squares = warp.sum(n, [&](int c) { return (x[c] - mean) * (x[c] - mean); });
        inverse_std = 1.0f / sqrtf(squares / count + kLayerNormEps);
        for (int t = 1; t <= tangents; ++t) {
            const float along = normalise_tangent(warp, x + t * ld, x, n, mean, inverse_std);
            if (kTangents) warp.each(1, [&](int) { tape.along[t - 1] = along; });
        }
        if (kValues) warp.each(1, [&](int) { *tape.inverse_std = inverse_std; });
    }
    warp.each(padded(n), [&](int c) {
        if (c >= n) {
            for (int t = 0; t <= tangents; ++t) x[t * ld + c] = 0.0f;
            return;
        }
        float value = x[c];
        float gain = 1.0f;
        if (layer.gain != nullptr) {
            const float normed = (value - mean) * inverse_std;
            gain = layer.gain[c];
            value = fmaf(normed, gain, layer.offset[c]);
            if (kValues) tape.normed[c] = normed;
        }
        float slope;
        float curvature;
        x[c] = kTangents ? Act::second(value, slope, curvature) : Act::first(value, slope);
        if (kValues) {
            tape.h[c] = x[c];
            tape.slope[c] = slope;
        }
        if (kTangents && tangents > 0) tape.curvature[c] = curvature;
        activate_tangents<kRecord>(x, ld, c, tangents, slope * gain, tape);
    });
}

struct NoTape {
    static constexpr Record kRecord = Record::kNothing;
    FLAME_BODY TapeRow row(int, int) const { return {}; }
};

// From the first layer's linear outputs in x to the network's outputs in x. `tape` gives the row
// that receives what layer l keeps of sample i of this tile.
template <int kRowsPerWarp, bool kTensorCores, typename Tape>
FLAME_INLINE void forward_from_first(const Block& block, Tile<kRowsPerWarp, kTensorCores>& tile,
                                     const MlpView& net, int member, int samples, int tangents,
                                     const Tape& tape) {
    const int group = 1 + tangents;
    for (int l = 0; l + 1 < net.num_layers; ++l) {
        const LayerView layer = member_layer(net, l, member);
        block.each_warp([&](const Warp& warp) {
            with_activation(net.activation, [&](auto act) {
                for (int i = warp.index; i < samples; i += kWarps) {
                    activate_sample<decltype(act), Tape::kRecord>(
                        warp, layer, tile.x + i * group * tile.ld, tile.ld, tangents,
                        tape.row(l, i));
                }
            });
        });
        linear(block, tile, member_layer(net, l + 1, member), samples * group, group);
    }
}

template <int kRowsPerWarp, bool kTensorCores, typename Tape>
FLAME_INLINE void forward_tile(const Block& block, Tile<kRowsPerWarp, kTensorCores>& tile,
                               const MlpView& net, int member, int samples, int tangents,
                               const Tape& tape) {
    const int group = 1 + tangents;
    linear(block, tile, member_layer(net, 0, member), samples * group, group);
    forward_from_first(block, tile, net, member, samples, tangents, tape);
}

}  // namespace flame::FLAME_ISA
