// What a training pass keeps in global memory between its kernels, and the backward pass of a tile.
//
// A block carries its rows forward and backward; each layer's delta (the gradient with respect to
// its linear outputs) goes to the tape, and weight gradients are then products over the whole batch
// (weight_gradients.h): no atomics, the same sums every time.
#pragma once

#include "cuda/launch.h"
#include "cuda/mlp_tile.h"
#include "cuda/tile_plan.h"

namespace flame::FLAME_ISA {

struct LayerTape {
    int ld;
    float* h;            // (members, rows, ld) activations
    float* slope;        // (members, rows, ld) activation's derivative
    float* normed;       // (members, rows, ld) LayerNorm's normalised values, null without
    float* inverse_std;  // (members, rows)
    float* delta;        // (members, rows, ld), null unless weights get gradients, like partial
    float* partial;      // (members, tiles, 2, ld): gain and offset gradients of each tile
};

struct Tape {
    int64_t rows;
    int64_t tiles;
    LayerTape hidden[kMaxLayers];
    float* input;  // (rows, input_ld)
    int input_ld;
    float* output_delta;  // (members, rows, out)
};

static inline Tape carve_tape(const MlpSpec& spec, int64_t rows, int64_t tiles, bool gradients,
                              Carver& memory) {
    Tape tape{};
    tape.rows = rows;
    tape.tiles = tiles;
    const size_t total = static_cast<size_t>(spec.members) * rows;
    for (int l = 0; l + 1 < spec.num_layers; ++l) {
        LayerTape& layer = tape.hidden[l];
        layer.ld = padded(spec.sizes[l + 1]);
        layer.h = memory.floats(total * layer.ld);
        layer.slope = memory.floats(total * layer.ld);
        if (gradients) layer.delta = memory.floats(total * layer.ld);
        if (!spec.layer_norm) continue;
        layer.normed = memory.floats(total * layer.ld);
        layer.inverse_std = memory.floats(total);
        if (!gradients) continue;
        layer.partial = memory.floats(static_cast<size_t>(spec.members) * tiles * 2 * layer.ld);
    }
    if (gradients) {
        tape.input_ld = padded(spec.sizes[0]);
        tape.input = memory.floats(static_cast<size_t>(rows) * tape.input_ld);
        tape.output_delta = memory.floats(total * spec.sizes[spec.num_layers]);
    }
    return tape;
}

// The part of the tape that one tile of one member writes and reads.
struct TileTape {
    static constexpr bool kRecord = true;
    const Tape* tape;
    int member;
    int64_t first;  // row
    int64_t tile;

    FLAME_BODY TapeRow row(int layer, int i) const {
        const LayerTape& t = tape->hidden[layer];
        const int64_t row = member * tape->rows + first + i;
        const int64_t at = row * t.ld;
        const bool norm = t.normed != nullptr;
        return {t.h + at, t.slope + at, norm ? t.normed + at : nullptr,
                norm ? t.inverse_std + row : nullptr};
    }
    FLAME_BODY float* delta(int layer, int i) const {
        const LayerTape& t = tape->hidden[layer];
        return t.delta + (member * tape->rows + first + i) * t.ld;
    }
    FLAME_BODY float* partial(int layer) const {
        const LayerTape& t = tape->hidden[layer];
        return t.partial + (member * tape->tiles + tile) * 2 * t.ld;
    }
    FLAME_BODY float* output_delta(int i, int out) const {
        return tape->output_delta + (member * tape->rows + first + i) * out;
    }
};

// Gain and offset gradients of this tile: column sums of d normed and of d.
template <int kRowsPerWarp>
FLAME_INLINE void norm_partials(const Block& block, const Tile<kRowsPerWarp>& tile, int n, int rows,
                                const TileTape& tape, int layer) {
    float* gain = tape.partial(layer);
    float* offset = gain + tape.tape->hidden[layer].ld;
    block.each_thread([&](int thread) {
        for (int c = thread; c < n; c += kThreads) {
            float gain_sum = 0.0f;
            float offset_sum = 0.0f;
            for (int r = 0; r < rows; ++r) {
                const float d = tile.x[r * tile.ld + c];
                gain_sum = fmaf(d, tape.row(layer, r).normed[c], gain_sum);
                offset_sum += d;
            }
            gain[c] = gain_sum;
            offset[c] = offset_sum;
        }
    });
}

// Gradient with respect to LayerNorm's input from that to its output: with d = delta gain,
// s (d - mean d - normed mean(d normed)).
FLAME_INLINE void norm_backward(const Warp& warp, const LayerView& layer, const TapeRow& tape,
                                float* delta) {
    const int n = layer.out;
    const float scale = 1.0f / static_cast<float>(n);
    const float shift = scale * warp.sum(n, [&](int c) { return delta[c] * layer.gain[c]; });
    const float along =
        scale * warp.sum(n, [&](int c) { return delta[c] * layer.gain[c] * tape.normed[c]; });
    const float inverse_std = *tape.inverse_std;
    warp.each(n, [&](int c) {
        delta[c] = (delta[c] * layer.gain[c] - shift - tape.normed[c] * along) * inverse_std;
    });
}

// From output deltas in x (rows, zero to the padded end) to the first layer's deltas in x; with
// kGradients every hidden layer's delta goes to the tape.
template <bool kGradients, int kRowsPerWarp>
FLAME_INLINE void backward_tile(const Block& block, Tile<kRowsPerWarp>& tile, const MlpView& net,
                                int rows, const TileTape& tape) {
    for (int l = net.num_layers - 2; l >= 0; --l) {
        const LayerView layer = member_layer(net, l, tape.member);
        const LayerView next = member_layer(net, l + 1, tape.member);
        const Operand<false> weight{next.weight, next.in, next.out, next.in};
        multiply<kRowsPerWarp>(block, rows, tile.x, tile.ld, weight, tile.slab,
                               [&](int r, int c, float sum) {
                                   tile.y[r * tile.ld_y + c] = sum * tape.row(l, r).slope[c];
                               });
        tile.swap();
        if (kGradients && layer.gain != nullptr) {
            norm_partials(block, tile, layer.out, rows, tape, l);
        }
        block.each_warp([&](const Warp& warp) {
            for (int r = warp.index; r < rows; r += kWarps) {
                float* delta = tile.x + r * tile.ld;
                if (layer.gain != nullptr) norm_backward(warp, layer, tape.row(l, r), delta);
                warp.each(round_up(layer.out), [&](int c) {
                    if (c >= layer.out) delta[c] = 0.0f;
                    if (kGradients && c < layer.out) tape.delta(l, r)[c] = delta[c];
                });
            }
        });
    }
}

}  // namespace flame::FLAME_ISA
