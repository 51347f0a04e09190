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

// N samples of G = group rows: a value and the tangents that are kept with it, none of them if 1.
struct LayerTape {
    int ld;
    float* h;            // (members, N, G, ld) activations
    float* slope;        // (members, N, ld) activation's derivative
    float* normed;       // (members, N, ld) LayerNorm's normalised values, null without
    float* inverse_std;  // (members, N)
    float* curvature;    // (members, N, ld) second derivative, null without tangents, like the two
                         // below
    float* tangent;  // (members, N, G - 1, ld) before the activation, LayerNorm: before its gain
    float* along;    // (members, N, G - 1) mean(normed * linear tangent), null without LayerNorm
    float* delta;    // (members, N, G, ld), null unless weights get gradients, like partial
    float* partial;  // (members, tiles, 2, ld): gain and offset gradients of each tile
};

struct Tape {
    int64_t samples;
    int group;
    int64_t tiles;
    LayerTape hidden[kMaxLayers];
    float* input;  // (N, G, input_ld), shared by the members
    int input_ld;
    float* output_delta;  // (members, N, G, out)
};

// What a forward pass writes.
static inline Tape carve_values(const MlpSpec& spec, int64_t samples, int group, Carver& memory) {
    Tape tape{};
    tape.samples = samples;
    tape.group = group;
    const size_t values = static_cast<size_t>(spec.members) * samples;
    const size_t tangents = values * (group - 1);
    for (int l = 0; l + 1 < spec.num_layers; ++l) {
        LayerTape& layer = tape.hidden[l];
        layer.ld = padded(spec.sizes[l + 1]);
        layer.h = memory.floats((values + tangents) * layer.ld);
        layer.slope = memory.floats(values * layer.ld);
        if (spec.layer_norm) {
            layer.normed = memory.floats(values * layer.ld);
            layer.inverse_std = memory.floats(values);
        }
        if (group == 1) continue;
        layer.curvature = memory.floats(values * layer.ld);
        layer.tangent = memory.floats(tangents * layer.ld);
        if (spec.layer_norm) layer.along = memory.floats(tangents);
    }
    return tape;
}

// What it writes besides where weights get gradients.
static inline void carve_input(const MlpSpec& spec, Tape& tape, Carver& memory) {
    tape.input_ld = padded(spec.sizes[0]);
    tape.input = memory.floats(static_cast<size_t>(tape.samples) * tape.group * tape.input_ld);
}

// What the backward pass of weights' gradients writes.
static inline void carve_deltas(const MlpSpec& spec, int64_t tiles, Tape& tape, Carver& memory) {
    tape.tiles = tiles;
    const size_t rows = static_cast<size_t>(spec.members) * tape.samples * tape.group;
    for (int l = 0; l + 1 < spec.num_layers; ++l) {
        LayerTape& layer = tape.hidden[l];
        layer.delta = memory.floats(rows * layer.ld);
        if (!spec.layer_norm) continue;
        layer.partial = memory.floats(static_cast<size_t>(spec.members) * tiles * 2 * layer.ld);
    }
    tape.output_delta = memory.floats(rows * spec.sizes[spec.num_layers]);
}

// Both passes in one launch, without tangents.
static inline Tape carve_tape(const MlpSpec& spec, int64_t rows, int64_t tiles, bool gradients,
                              Carver& memory) {
    Tape tape = carve_values(spec, rows, 1, memory);
    if (gradients) {
        carve_input(spec, tape, memory);
        carve_deltas(spec, tiles, tape, memory);
    }
    return tape;
}

// The part of the tape that one tile of one member writes and reads.
struct TileTape {
    static constexpr Record kRecord = Record::kValues;
    const Tape* tape;
    int member;
    int64_t first;  // sample
    int64_t tile;

    FLAME_BODY TapeRow row(int layer, int i) const {
        const LayerTape& t = tape->hidden[layer];
        const int64_t at = sample(i) * t.ld;
        const bool norm = t.normed != nullptr;
        TapeRow row{};
        row.h = t.h + at;
        row.slope = t.slope + at;
        row.normed = norm ? t.normed + at : nullptr;
        row.inverse_std = norm ? t.inverse_std + sample(i) : nullptr;
        return row;
    }
    FLAME_BODY float* delta(int layer, int i) const {
        const LayerTape& t = tape->hidden[layer];
        return t.delta + sample(i) * tape->group * t.ld;
    }
    FLAME_BODY float* partial(int layer) const {
        const LayerTape& t = tape->hidden[layer];
        return t.partial + (member * tape->tiles + tile) * 2 * t.ld;
    }
    FLAME_BODY float* output_delta(int i, int out) const {
        return tape->output_delta + sample(i) * tape->group * out;
    }
    FLAME_BODY int64_t sample(int i) const { return member * tape->samples + first + i; }
};

// Gain and offset gradients of this tile: column sums of d normed (and of tangents' d tangent) and
// of d.
template <int kRowsPerWarp, typename TapeOfTile>
FLAME_INLINE void norm_partials(const Block& block, const Tile<kRowsPerWarp>& tile, int n,
                                int samples, const TapeOfTile& tape, int layer) {
    const int group = TapeOfTile::kRecord == Record::kTangents ? tape.tape->group : 1;
    float* gain = tape.partial(layer);
    float* offset = gain + tape.tape->hidden[layer].ld;
    block.each_thread([&](int thread) {
        for (int c = thread; c < n; c += kThreads) {
            float gain_sum = 0.0f;
            float offset_sum = 0.0f;
            for (int i = 0; i < samples; ++i) {
                const TapeRow kept = tape.row(layer, i);
                const float* d = tile.x + i * group * tile.ld + c;
                gain_sum = fmaf(d[0], kept.normed[c], gain_sum);
                offset_sum += d[0];
                for (int t = 1; t < group; ++t) {
                    gain_sum = fmaf(d[t * tile.ld], kept.tangent[(t - 1) * kept.ld + c], gain_sum);
                }
            }
            gain[c] = gain_sum;
            offset[c] = offset_sum;
        }
    });
}

// delta <- gradient with respect to LayerNorm's input from that to its normalised values, d(c):
// s (d - mean d - normed (mean(d normed) + more)).
template <typename Gradient>
FLAME_INLINE void norm_backward(const Warp& warp, int n, const TapeRow& tape, float more,
                                float* delta, Gradient&& d) {
    const float scale = 1.0f / static_cast<float>(n);
    const float shift = scale * warp.sum(n, d);
    const float along = more + scale * warp.sum(n, [&](int c) { return d(c) * tape.normed[c]; });
    const float inverse_std = *tape.inverse_std;
    warp.each(n, [&](int c) { delta[c] = (d(c) - shift - tape.normed[c] * along) * inverse_std; });
}

// A finished row of deltas: zero to the padded end, and `kept` on the tape unless that is null.
FLAME_INLINE void keep_delta(const Warp& warp, int n, float* delta, float* kept) {
    warp.each(padded(n), [&](int c) {
        if (c >= n) delta[c] = 0.0f;
        if (kept != nullptr && c < n) kept[c] = delta[c];
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
                if (layer.gain != nullptr) {
                    norm_backward(warp, layer.out, tape.row(l, r), 0.0f, delta,
                                  [&](int c) { return delta[c] * layer.gain[c]; });
                }
                keep_delta(warp, layer.out, delta, kGradients ? tape.delta(l, r) : nullptr);
            }
        });
    }
}

}  // namespace flame::FLAME_ISA
