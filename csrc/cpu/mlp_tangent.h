// An MLP with T forward tangents per row, and the gradient of a loss that contains the tangents.
//
// Rows are grouped by sample: row 0 of a group of 1 + T is the value, rows 1 .. T its tangents, so
// every layer is one product over all rows and the tangents share the value's activation
// derivatives. For y = f(x) with tangents y' = f'(x) x': the backward pass needs f'' as well,
//     grad x = f'(x) grad y + sum_t f''(x) x'_t grad y'_t,     grad x'_t = f'(x) grad y'_t.
#pragma once

#include "cpu/mlp_tape.h"
#include "partition.h"

namespace flame::FLAME_ISA {

struct TangentLayer {
    ptrdiff_t ld;
    float* h;            // (N (1 + T), ld) linear outputs, then activations and their tangents
    float* tangent;      // (N (1 + T), ld) tangents before the activation (LayerNorm: before gain);
                         //   row 0 of a group: LayerNorm's normalised values
    float* slope;        // (N, ld) f'
    float* curvature;    // (N, ld) f''
    float* delta;        // (N (1 + T), ld) gradients with respect to linear outputs
    float* inverse_std;  // (N), LayerNorm only, like the two below
    float* along;        // (N, T) mean(normalised value * linear tangent)
    float* partial;      // (chunks, 2, ld)
};

struct TangentTape {
    int64_t samples;
    int tangents;
    int chunk;  // samples per chunk
    int64_t chunks;
    int num_layers;
    TangentLayer hidden[kMaxLayers];
    ptrdiff_t output_ld;
    float* output;        // (N (1 + T), output_ld)
    float* output_delta;  // the same shape
};

// Samples per chunk: at most about kMaxTileRows rows, in an even number of chunks, so that two
// threads have the same to do. Sums over samples are cut here: not by the number of threads.
FLAME_INLINE int tangent_chunk(int64_t samples, int tangents) {
    const int fit = kMaxTileRows / (1 + tangents);
    const int limit = fit < 1 ? 1 : fit;
    if (samples <= limit) return static_cast<int>(samples);
    const int64_t fewest = divide_up(samples, limit);
    const int64_t chunks = round_up(fewest, 2);
    return static_cast<int>(divide_up(samples, chunks));
}

// With `record` the arrays hold all samples and what the backward pass needs; without, one chunk.
static inline TangentTape make_tangent_tape(const MlpSpec& spec, int64_t samples, int tangents,
                                            bool record, Workspace& workspace) {
    TangentTape tape{};
    tape.samples = samples;
    tape.tangents = tangents;
    tape.chunk = tangent_chunk(samples, tangents);
    tape.chunks = samples > 0 ? divide_up(samples, tape.chunk) : 0;
    tape.num_layers = spec.num_layers;
    const int64_t kept = record ? samples : tape.chunk;
    const size_t rows = static_cast<size_t>(kept) * (1 + tangents);
    for (int l = 0; l + 1 < spec.num_layers; ++l) {
        TangentLayer& layer = tape.hidden[l];
        layer.ld = padded_columns(spec.sizes[l + 1]);
        layer.h = workspace.floats(rows * layer.ld);
        if (!record) continue;
        layer.tangent = workspace.floats(rows * layer.ld);
        layer.slope = workspace.floats(kept * layer.ld);
        layer.curvature = workspace.floats(kept * layer.ld);
        layer.delta = workspace.floats(rows * layer.ld);
        if (!spec.layer_norm) continue;
        layer.inverse_std = workspace.floats(kept);
        layer.along = workspace.floats(static_cast<size_t>(kept) * tangents);
        layer.partial = workspace.floats(tape.chunks * 2 * layer.ld);
    }
    tape.output_ld = padded_columns(spec.sizes[spec.num_layers]);
    tape.output = workspace.floats(rows * tape.output_ld);
    if (record) tape.output_delta = workspace.floats(rows * tape.output_ld);
    return tape;
}

FLAME_INLINE RowRange tangent_range(const TangentTape& tape, int64_t c) {
    const int64_t first = c * tape.chunk;
    return {first, row_count(first, tape.samples, tape.chunk)};
}

// --- Forward

// One sample of a hidden layer without LayerNorm; `i` is its position in the tape.
template <typename Act, bool kRecord>
static inline void activate_sample(const PackedLayer& weights, const TangentLayer& layer,
                                   int tangents, int64_t i) {
    float* h = layer.h + i * (1 + tangents) * layer.ld;
    for (int c = 0; c < weights.out; c += kLanes) {
        vf d;
        vf dd;
        store(h + c, kRecord ? Act::second(load(h + c), d, dd) : Act::first(load(h + c), d));
        if (kRecord) {
            store(layer.slope + i * layer.ld + c, d);
            store(layer.curvature + i * layer.ld + c, dd);
        }
        for (int t = 1; t <= tangents; ++t) {
            float* x = h + t * layer.ld + c;
            if (kRecord) store(layer.tangent + (x - layer.h), load(x));
            store(x, d * load(x));
        }
    }
}

// Normalises one row of tangents: s (x' - mean x' - xhat along), along = mean(xhat x').
static inline float normalise_tangent(float* x, const float* normed, int n, float inverse_std) {
    for (int c = n; c < round_up(n, kLanes); ++c) x[c] = 0.0f;
    vf total = zero();
    vf product = zero();
    for (int c = 0; c < n; c += kLanes) {
        total = total + load(x + c);
        product = fma(load(x + c), load(normed + c), product);
    }
    const float mean = sum(total) / static_cast<float>(n);
    const float along = sum(product) / static_cast<float>(n);
    for (int c = 0; c < n; c += kLanes) {
        const vf centred = load(x + c) - splat(mean) - load(normed + c) * splat(along);
        store(x + c, centred * splat(inverse_std));
    }
    return along;
}

// The same with LayerNorm. `normed` is scratch of one row when nothing is recorded.
template <typename Act, bool kRecord>
static inline void activate_normed_sample(const PackedLayer& weights, const TangentLayer& layer,
                                          int tangents, int64_t i, float* scratch) {
    const int n = weights.out;
    const ptrdiff_t ld = layer.ld;
    float* h = layer.h + i * (1 + tangents) * ld;
    float* kept = kRecord ? layer.tangent + i * (1 + tangents) * ld : nullptr;
    float* normed = kRecord ? kept : scratch;
    const RowMoments m = row_moments(h, n);
    for (int c = n; c < round_up(n, kLanes); ++c) h[c] = m.mean;
    for (int c = 0; c < n; c += kLanes) {
        store(normed + c, (load(h + c) - splat(m.mean)) * splat(m.inverse_std));
    }
    if (kRecord) layer.inverse_std[i] = m.inverse_std;
    for (int t = 1; t <= tangents; ++t) {
        const float along = normalise_tangent(h + t * ld, normed, n, m.inverse_std);
        if (kRecord) layer.along[i * tangents + t - 1] = along;
    }
    for (int c = 0; c < n; c += kLanes) {
        const vf gain = load(weights.gain + c);
        const vf x = fma(load(normed + c), gain, load(weights.offset + c));
        vf d;
        vf dd;
        store(h + c, kRecord ? Act::second(x, d, dd) : Act::first(x, d));
        if (kRecord) {
            store(layer.slope + i * ld + c, d);
            store(layer.curvature + i * ld + c, dd);
        }
        for (int t = 1; t <= tangents; ++t) {
            float* y = h + t * ld + c;
            if (kRecord) store(kept + t * ld + c, load(y));
            store(y, d * gain * load(y));
        }
    }
}

// From linear outputs of the first layer (in hidden[0].h, or `output`) for `samples` samples that
// start at position `at` of the tape, to the network's outputs and their tangents.
template <typename Act, bool kRecord>
static inline void tangent_forward(const PackedLayer* layers, const TangentTape& tape, int64_t at,
                                   int samples) {
    float scratch[kRecord ? 1 : kMaxWidth + kLanes];
    const int group = 1 + tape.tangents;
    for (int l = 0; l + 1 < tape.num_layers; ++l) {
        const TangentLayer& layer = tape.hidden[l];
        for (int64_t i = at; i < at + samples; ++i) {
            if (layers[l].gain) {
                activate_normed_sample<Act, kRecord>(layers[l], layer, tape.tangents, i, scratch);
            } else {
                activate_sample<Act, kRecord>(layers[l], layer, tape.tangents, i);
            }
        }
        const bool last = l + 2 == tape.num_layers;
        const ptrdiff_t ld = last ? tape.output_ld : tape.hidden[l + 1].ld;
        float* next = last ? tape.output : tape.hidden[l + 1].h;
        const PackedLayer& weights = layers[l + 1];
        const int rows = samples * group;
        gemm_packed(rows, weights.out, 0, weights.in, weights.in, layer.h + at * group * layer.ld,
                    layer.ld, weights.forward, nullptr, next + at * group * ld, ld);
        for (int i = 0; i < samples; ++i) {
            float* row = next + (at + i) * group * ld;
            for (int c = 0; c < weights.out; c += kLanes) {
                store(row + c, load(row + c) + load(weights.bias + c));
            }
        }
    }
}

// --- Backward

// delta of one sample, from gradients with respect to activations to those with respect to the
// activation's inputs.
static inline void activation_backward(const TangentLayer& layer, const PackedLayer& weights,
                                       int tangents, int64_t i) {
    const ptrdiff_t ld = layer.ld;
    float* delta = layer.delta + i * (1 + tangents) * ld;
    const float* tangent = layer.tangent + i * (1 + tangents) * ld;
    for (int c = 0; c < weights.out; c += kLanes) {
        const vf d = load(layer.slope + i * ld + c);
        const vf dd = load(layer.curvature + i * ld + c);
        vf mixed = zero();
        for (int t = 1; t <= tangents; ++t) {
            float* g = delta + t * ld + c;
            mixed = fma(load(tangent + t * ld + c), load(g), mixed);
            store(g, d * load(g));
        }
        const vf scale = weights.gain ? dd * load(weights.gain + c) : dd;
        store(delta + c, fma(scale, mixed, d * load(delta + c)));
    }
}

// LayerNorm's part for one tangent row: with b = gain * delta, delta <- s (b - mean b - xhat c1),
// c1 = mean(b xhat); adds what the normalised value receives to `value` and returns mean(b xhat').
static inline float norm_tangent_backward(float* delta, const float* normed, const float* tangent,
                                          const float* gain, float* gain_sum, float* value, int n,
                                          float inverse_std, float along) {
    for (int c = n; c < round_up(n, kLanes); ++c) delta[c] = 0.0f;
    vf mean = zero();
    vf product = zero();
    vf second = zero();
    for (int c = 0; c < n; c += kLanes) {
        const vf d = load(delta + c);
        const vf b = d * load(gain + c);
        store(gain_sum + c, fma(d, load(tangent + c), load(gain_sum + c)));
        mean = mean + b;
        product = fma(b, load(normed + c), product);
        second = fma(b, load(tangent + c), second);
        store(delta + c, b);
    }
    const float scale = 1.0f / static_cast<float>(n);
    const vf shift = splat(sum(mean) * scale);
    const vf c1 = splat(sum(product) * scale);
    const vf s = splat(inverse_std);
    const vf sa = splat(inverse_std * along);
    for (int c = 0; c < n; c += kLanes) {
        const vf b = load(delta + c);
        const vf x = load(normed + c);
        const vf lost = sa * fma(c1, x, b) + c1 * load(tangent + c);
        store(value + c, load(value + c) - lost);
        store(delta + c, s * (b - shift - x * c1));
    }
    return sum(second) * scale;
}

// All rows of one sample; `value` is scratch of one row.
static inline void norm_sample_backward(const TangentLayer& layer, const PackedLayer& weights,
                                        int tangents, int64_t i, float* partial, float* value) {
    const int n = weights.out;
    const ptrdiff_t ld = layer.ld;
    float* delta = layer.delta + i * (1 + tangents) * ld;
    const float* normed = layer.tangent + i * (1 + tangents) * ld;
    float* gain_sum = partial;
    float* offset_sum = partial + ld;
    for (int c = n; c < round_up(n, kLanes); ++c) delta[c] = 0.0f;
    for (int c = 0; c < n; c += kLanes) {
        const vf d = load(delta + c);
        store(gain_sum + c, fma(d, load(normed + c), load(gain_sum + c)));
        store(offset_sum + c, load(offset_sum + c) + d);
        store(value + c, d * load(weights.gain + c));
    }
    const float s = layer.inverse_std[i];
    float second = 0.0f;
    for (int t = 1; t <= tangents; ++t) {
        second += norm_tangent_backward(delta + t * ld, normed, normed + t * ld, weights.gain,
                                        gain_sum, value, n, s, layer.along[i * tangents + t - 1]);
    }
    vf mean = zero();
    vf product = zero();
    for (int c = n; c < round_up(n, kLanes); ++c) value[c] = 0.0f;
    for (int c = 0; c < n; c += kLanes) {
        mean = mean + load(value + c);
        product = fma(load(value + c), load(normed + c), product);
    }
    const float scale = 1.0f / static_cast<float>(n);
    const vf shift = splat(sum(mean) * scale);
    const vf slope = splat(sum(product) * scale + second);
    for (int c = 0; c < n; c += kLanes) {
        const vf a = load(value + c) - shift - load(normed + c) * slope;
        store(delta + c, a * splat(s));
    }
}

// Fills every hidden layer's delta of chunk c from output_delta.
static inline void tangent_backward(const PackedLayer* layers, const TangentTape& tape, int64_t c) {
    const RowRange range = tangent_range(tape, c);
    const int group = 1 + tape.tangents;
    float value[kMaxWidth + kLanes];
    for (int l = tape.num_layers - 2; l >= 0; --l) {
        const TangentLayer& layer = tape.hidden[l];
        const bool last = l + 2 == tape.num_layers;
        const ptrdiff_t ld = last ? tape.output_ld : tape.hidden[l + 1].ld;
        const float* from = last ? tape.output_delta : tape.hidden[l + 1].delta;
        const PackedLayer& weights = layers[l + 1];
        gemm_packed(range.rows * group, weights.in, 0, weights.out, weights.out,
                    from + range.first * group * ld, ld, weights.backward, nullptr,
                    layer.delta + range.first * group * layer.ld, layer.ld);
        float* partial = layers[l].gain ? layer.partial + c * 2 * layer.ld : nullptr;
        if (partial) __builtin_memset(partial, 0, 2 * layer.ld * sizeof(float));
        for (int64_t i = range.first; i < range.first + range.rows; ++i) {
            activation_backward(layer, layers[l], tape.tangents, i);
            if (partial) norm_sample_backward(layer, layers[l], tape.tangents, i, partial, value);
        }
    }
}

// Weight gradients of a recorded tape whose tangents were the unit vectors of the first inputs.
static inline int append_tangent_gradients(const MlpSpec& spec, const TangentTape& tape,
                                           const float* input, ptrdiff_t ldx, float* gradients,
                                           LayerGradient* list) {
    const int group = 1 + tape.tangents;
    for (int l = 0; l < spec.num_layers; ++l) {
        LayerGradient g = gradient_target(spec, l, 0, gradients);
        const bool last = l + 1 == spec.num_layers;
        const ptrdiff_t ld = last ? tape.output_ld : tape.hidden[l].ld;
        g.delta = last ? tape.output_delta : tape.hidden[l].delta;
        g.bias_rows = tape.samples;
        g.bias_ldd = group * ld;
        g.rows = l == 0 ? tape.samples : tape.samples * group;
        g.ldd = l == 0 ? group * ld : ld;
        g.x = l == 0 ? input : tape.hidden[l - 1].h;
        g.ldx = l == 0 ? ldx : tape.hidden[l - 1].ld;
        g.basis = l == 0 ? tape.tangents : 0;
        if (has_norm(spec, l)) {
            g.norm_partial = tape.hidden[l].partial;
            g.norm_chunks = tape.chunks;
            g.norm_ld = tape.hidden[l].ld;
        }
        list[l] = g;
    }
    return spec.num_layers;
}

}  // namespace flame::FLAME_ISA
