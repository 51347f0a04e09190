// Evaluating an MLP on a tile of rows that stays in the L2 cache, without keeping anything for a
// gradient. The widest two activation buffers and one panel of weights are what must fit.
#pragma once

#include "cpu/mlp_pack.h"
#include "cpu/row_cut.h"
#include "mlp_activation.h"

namespace flame::FLAME_ISA {

// Larger tiles are not faster, and 256 rows should still be work for several threads.
constexpr int kMaxTileRows = 48;

static inline int widest_row(const MlpSpec& spec) {
    int widest = 0;
    for (int l = 1; l <= spec.num_layers; ++l) {
        if (spec.sizes[l] > widest) widest = spec.sizes[l];
    }
    return padded_columns(widest);
}

// Rows per tile: two buffers in about 256 KB, a multiple of the register tile's rows.
static inline int tile_rows(int row_floats) {
    const int fit = 256 * 1024 / (2 * 4 * row_floats) / 12 * 12;
    return fit > kMaxTileRows ? kMaxTileRows : (fit < 24 ? 24 : fit);
}

static inline void fill_rows(const float** init, int rows, const float* first, ptrdiff_t stride) {
    for (int i = 0; i < rows; ++i) init[i] = first + i * stride;
}

struct RowMoments {
    float mean;
    float inverse_std;
};

// Mean and 1 / sqrt(variance + eps) of n values, in two passes (the row is in L1). Two sums side by
// side: one alone would wait for its own additions.
static inline RowMoments row_moments(const float* x, int n) {
    vf even = zero();
    vf odd = zero();
    int c = 0;
    for (; c + 2 * kLanes <= n; c += 2 * kLanes) {
        even = even + load(x + c);
        odd = odd + load(x + c + kLanes);
    }
    float total = sum(even + odd);
    for (; c < n; ++c) total += x[c];
    const float mean = total / static_cast<float>(n);
    even = odd = zero();
    for (c = 0; c + 2 * kLanes <= n; c += 2 * kLanes) {
        const vf first = load(x + c) - splat(mean);
        const vf second = load(x + c + kLanes) - splat(mean);
        even = fma(first, first, even);
        odd = fma(second, second, odd);
    }
    float variance = sum(even + odd);
    for (; c < n; ++c) variance += (x[c] - mean) * (x[c] - mean);
    variance /= static_cast<float>(n);
    return {mean, 1.0f / __builtin_sqrtf(variance + kLayerNormEps)};
}

// x <- activation(LayerNorm(x)) for each row of a hidden layer's pre-activations.
template <typename Act>
static inline void activate_rows(const PackedLayer& layer, int rows, float* x, ptrdiff_t ldx) {
    const int n = layer.out;
    for (int i = 0; i < rows; ++i, x += ldx) {
        if (layer.gain) {
            const RowMoments m = row_moments(x, n);
            const vf scale = splat(m.inverse_std);
            const vf shift = splat(-m.mean * m.inverse_std);
            for (int c = 0; c < n; c += kLanes) {
                const vf normed = fma(load(x + c), scale, shift);
                store(x + c, Act::value(fma(normed, load(layer.gain + c), load(layer.offset + c))));
            }
        } else {
            for (int c = 0; c < n; c += kLanes) store(x + c, Act::value(load(x + c)));
        }
    }
}

// Dot product over n values; both operands may be read up to the next multiple of kLanes only when
// n is one, so the tail is scalar.
static inline float dot(const float* x, const float* y, int n) {
    vf a = zero();
    vf b = zero();
    int c = 0;
    for (; c + 2 * kLanes <= n; c += 2 * kLanes) {
        a = fma(load(x + c), load(y + c), a);
        b = fma(load(x + c + kLanes), load(y + c + kLanes), b);
    }
    float total = sum(a + b);
    for (; c < n; ++c) total += x[c] * y[c];
    return total;
}

// Two activation buffers of a tile and its init pointers.
struct TileBuffers {
    float* x;
    float* y;
    ptrdiff_t ld;
    const float** init;
};

static inline TileBuffers make_tile_buffers(int rows, int row_floats, Workspace& workspace) {
    const size_t size = static_cast<size_t>(rows) * row_floats;
    return {workspace.floats(size), workspace.floats(size), row_floats,
            static_cast<const float**>(workspace.bytes(rows * sizeof(float*)))};
}

// From the first layer's pre-activations in tile.x to the output pre-activations; returns the
// buffer that holds them. With stop_before_output the last hidden activations are returned.
template <typename Act>
static inline float* finish_tile(const PackedLayer* layers, int num_layers, bool stop_before_output,
                                 int rows, const TileBuffers& tile) {
    float* x = tile.x;
    float* y = tile.y;
    for (int l = 0; l + 1 < num_layers; ++l) {
        activate_rows<Act>(layers[l], rows, x, tile.ld);
        if (stop_before_output && l + 2 == num_layers) break;
        const PackedLayer& next = layers[l + 1];
        fill_rows(tile.init, rows, next.bias, 0);
        gemm_packed(rows, next.out, 0, next.in, next.in, x, tile.ld, next.forward, tile.init, y,
                    tile.ld);
        float* swap = x;
        x = y;
        y = swap;
    }
    return x;
}

}  // namespace flame::FLAME_ISA
