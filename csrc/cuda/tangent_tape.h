// A tape that keeps forward tangents, and the backward pass of a loss that contains them. Rows are
// grouped as in mlp_tile.h. For y = f(x) with tangents y'_t = f'(x) x'_t the backward pass needs
// f'' as well:
//     grad x = f'(x) grad y + sum_t f''(x) x'_t grad y'_t,     grad x'_t = f'(x) grad y'_t.
#pragma once

#include "cuda/tape.h"

namespace flame::FLAME_ISA {

// The part of such a tape that one tile of one member writes and reads.
struct TangentTileTape : TileTape {
    static constexpr Record kRecord = Record::kTangents;

    FLAME_BODY TapeRow row(int layer, int i) const {
        const LayerTape& t = tape->hidden[layer];
        const int64_t s = sample(i);
        const int tangents = tape->group - 1;
        TapeRow row = TileTape::row(layer, i);
        row.h = t.h + s * tape->group * t.ld;
        row.ld = t.ld;
        if (tangents == 0) return row;
        row.curvature = t.curvature + s * t.ld;
        row.tangent = t.tangent + s * tangents * t.ld;
        row.along = t.along != nullptr ? t.along + s * tangents : nullptr;
        return row;
    }
};

// One sample's delta (its tangents' below it) from gradients with respect to activations to those
// with respect to the activation's inputs, of tangents: before LayerNorm's gain enters.
FLAME_INLINE void activation_backward(const Warp& warp, const LayerView& layer, const TapeRow& tape,
                                      float* delta, int ld, int tangents) {
    warp.each(layer.out, [&](int c) {
        const float slope = tape.slope[c];
        float value = slope * delta[c];
        if (tangents > 0) {
            float mixed = 0.0f;
            for (int t = 1; t <= tangents; ++t) {
                float& d = delta[t * ld + c];
                mixed = fmaf(tape.tangent[(t - 1) * tape.ld + c], d, mixed);
                d *= slope;
            }
            const float gain = layer.gain != nullptr ? layer.gain[c] : 1.0f;
            value = fmaf(tape.curvature[c] * gain, mixed, value);
        }
        delta[c] = value;
    });
}

// LayerNorm's part for tangent t (from 0): with b = gain delta and c1 = mean(b normed),
// delta <- s (b - mean b - normed c1). `value`, the gradient with respect to the normalised values,
// loses what the tangent took from them; returns mean(b tangent).
FLAME_INLINE float norm_tangent_backward(const Warp& warp, const LayerView& layer,
                                         const TapeRow& tape, int t, float* delta, float* value) {
    const int n = layer.out;
    const float* tangent = tape.tangent + t * tape.ld;
    const auto b = [&](int c) { return delta[c] * layer.gain[c]; };
    const float scale = 1.0f / static_cast<float>(n);
    const float shift = scale * warp.sum(n, b);
    const float c1 = scale * warp.sum(n, [&](int c) { return b(c) * tape.normed[c]; });
    const float second = scale * warp.sum(n, [&](int c) { return b(c) * tangent[c]; });
    const float inverse_std = *tape.inverse_std;
    const float along = inverse_std * tape.along[t];
    warp.each(n, [&](int c) {
        const float normed = tape.normed[c];
        value[c] -= along * fmaf(c1, normed, b(c)) + c1 * tangent[c];
        delta[c] = (b(c) - shift - normed * c1) * inverse_std;
    });
    return second;
}

// LayerNorm's part for all rows of one sample.
FLAME_INLINE void norm_sample_backward(const Warp& warp, const LayerView& layer,
                                       const TapeRow& tape, float* delta, int ld, int tangents) {
    warp.each(layer.out, [&](int c) { delta[c] *= layer.gain[c]; });
    float second = 0.0f;
    for (int t = 0; t < tangents; ++t) {
        second += norm_tangent_backward(warp, layer, tape, t, delta + (t + 1) * ld, delta);
    }
    norm_backward(warp, layer.out, tape, second, delta, [&](int c) { return delta[c]; });
}

// From output deltas in x (rows of all groups, zero to the padded end) to the first layer's deltas
// in x; every hidden layer's delta goes to the tape.
template <int kRowsPerWarp>
FLAME_INLINE void tangent_backward_tile(const Block& block, Tile<kRowsPerWarp>& tile,
                                        const MlpView& net, int samples,
                                        const TangentTileTape& tape) {
    const int group = tape.tape->group;
    for (int l = net.num_layers - 2; l >= 0; --l) {
        const LayerView layer = member_layer(net, l, tape.member);
        const LayerView next = member_layer(net, l + 1, tape.member);
        const Operand<false> weight{next.weight, next.in, next.out, next.in};
        multiply<kRowsPerWarp>(block, samples * group, tile.x, tile.ld, weight, tile.slab,
                               [&](int r, int c, float sum) { tile.y[r * tile.ld_y + c] = sum; });
        tile.swap();
        const int stride = group * tile.ld;
        block.each_warp([&](const Warp& warp) {
            for (int i = warp.index; i < samples; i += kWarps) {
                activation_backward(warp, layer, tape.row(l, i), tile.x + i * stride, tile.ld,
                                    group - 1);
            }
        });
        if (layer.gain != nullptr) norm_partials(block, tile, layer.out, samples, tape, l);
        block.each_warp([&](const Warp& warp) {
            for (int i = warp.index; i < samples; i += kWarps) {
                float* delta = tile.x + i * stride;
                if (layer.gain != nullptr) {
                    norm_sample_backward(warp, layer, tape.row(l, i), delta, tile.ld, group - 1);
                }
                for (int t = 0; t < group; ++t) {
                    keep_delta(warp, layer.out, delta + t * tile.ld,
                               tape.delta(l, i) + t * tape.tape->hidden[l].ld);
                }
            }
        });
    }
}

}  // namespace flame::FLAME_ISA
