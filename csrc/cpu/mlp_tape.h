// Forward pass that keeps what the backward pass needs, and the backward pass itself, for one
// member of an ensemble on B rows.
//
// Rows are processed in fixed chunks (the same for any number of threads). The backward pass writes
// each layer's delta (gradient with respect to the linear output) to memory; weight gradients are
// then products over the whole batch, one task per block of output rows, so there are no per-thread
// gradient buffers to reduce and every element is summed in the same order on any machine layout.
#pragma once

#include "cpu/mlp_tile.h"
#include "partition.h"

namespace flame::FLAME_ISA {

constexpr int kTapeRows = 48;
constexpr int kGradientRows = 48;    // output rows per weight-gradient task
constexpr int kGradientDepth = 128;  // batch rows per pass: both operands' lines fit in L1

struct TapeLayer {
    ptrdiff_t ld;
    float* h;            // (B, ld) activations
    float* slope;        // (B, ld) f'(pre-activation)
    float* delta;        // (B, ld) gradient with respect to the linear output
    float* normed;       // (B, ld) LayerNorm's normalised values, null without
    float* inverse_std;  // (B)
    float* partial;      // (chunks, 2, ld): gain and offset gradients of each chunk
};

struct Tape {
    RowCut cut;
    int num_layers;
    TapeLayer hidden[kMaxLayers];
    ptrdiff_t output_ld;
    float* output;        // (B, output_ld)
    float* output_delta;  // (B, output_ld), filled by the loss
};

static inline Tape make_tape(const MlpSpec& spec, int64_t rows, Workspace& workspace) {
    Tape tape{};
    tape.cut = even_cut(rows, kTapeRows);
    tape.num_layers = spec.num_layers;
    for (int l = 0; l + 1 < spec.num_layers; ++l) {
        TapeLayer& layer = tape.hidden[l];
        layer.ld = padded_columns(spec.sizes[l + 1]);
        const size_t size = static_cast<size_t>(rows) * layer.ld;
        layer.h = workspace.floats(size);
        layer.slope = workspace.floats(size);
        layer.delta = workspace.floats(size);
        if (!spec.layer_norm) continue;
        layer.normed = workspace.floats(size);
        layer.inverse_std = workspace.floats(rows);
        layer.partial = workspace.floats(tape.cut.chunks * 2 * layer.ld);
    }
    tape.output_ld = padded_columns(spec.sizes[spec.num_layers]);
    tape.output = workspace.floats(static_cast<size_t>(rows) * tape.output_ld);
    tape.output_delta = workspace.floats(static_cast<size_t>(rows) * tape.output_ld);
    return tape;
}

// --- Forward

// layer.h holds linear outputs and receives activations; slope, normed and inverse_std are kept.
template <typename Act>
static inline void activate_and_record(const PackedLayer& weights, const TapeLayer& layer,
                                       const RowRange& range) {
    const int n = weights.out;
    for (int64_t i = range.first; i < range.first + range.rows; ++i) {
        float* h = layer.h + i * layer.ld;
        float* slope = layer.slope + i * layer.ld;
        vf d;
        if (!weights.gain) {
            for (int c = 0; c < n; c += kLanes) {
                store(h + c, Act::first(load(h + c), d));
                store(slope + c, d);
            }
            continue;
        }
        const RowMoments m = row_moments(h, n);
        layer.inverse_std[i] = m.inverse_std;
        float* normed = layer.normed + i * layer.ld;
        for (int c = 0; c < n; c += kLanes) {
            const vf x = (load(h + c) - splat(m.mean)) * splat(m.inverse_std);
            store(normed + c, x);
            store(h + c, Act::first(fma(x, load(weights.gain + c), load(weights.offset + c)), d));
            store(slope + c, d);
        }
    }
}

// Linear outputs of the first layer must be in hidden[0].h (or in `output` without hidden layers).
template <typename Act>
static inline void record_forward(const PackedLayer* layers, const Tape& tape,
                                  const RowRange& range) {
    const float* init[kTapeRows];
    for (int l = 0; l + 1 < tape.num_layers; ++l) {
        const TapeLayer& layer = tape.hidden[l];
        activate_and_record<Act>(layers[l], layer, range);
        const bool last = l + 2 == tape.num_layers;
        const ptrdiff_t ld = last ? tape.output_ld : tape.hidden[l + 1].ld;
        float* next = last ? tape.output : tape.hidden[l + 1].h;
        const PackedLayer& weights = layers[l + 1];
        fill_rows(init, range.rows, weights.bias, 0);
        gemm_packed(range.rows, weights.out, 0, weights.in, weights.in,
                    layer.h + range.first * layer.ld, layer.ld, weights.forward, init,
                    next + range.first * ld, ld);
    }
}

FLAME_INLINE float* first_linear(const Tape& tape) {
    return tape.num_layers > 1 ? tape.hidden[0].h : tape.output;
}

FLAME_INLINE ptrdiff_t first_linear_ld(const Tape& tape) {
    return tape.num_layers > 1 ? tape.hidden[0].ld : tape.output_ld;
}

// The whole forward pass of one chunk from input rows (B, ldx).
template <typename Act>
static inline void record_rows(const PackedLayer* layers, const Tape& tape, const RowRange& range,
                               const float* input, ptrdiff_t ldx) {
    const float* init[kTapeRows];
    fill_rows(init, range.rows, layers[0].bias, 0);
    const ptrdiff_t ld = first_linear_ld(tape);
    gemm_packed(range.rows, layers[0].out, 0, layers[0].in, layers[0].in, input + range.first * ldx,
                ldx, layers[0].forward, init, first_linear(tape) + range.first * ld, ld);
    record_forward<Act>(layers, tape, range);
}

// --- Backward

// delta <- gradient with respect to LayerNorm's input, from that with respect to its output:
// with d = delta * gain, dx = inverse_std (d - mean(d) - normed mean(d normed)).
static inline void norm_backward(const PackedLayer& weights, const TapeLayer& layer,
                                 const RowRange& range, float* partial) {
    const int n = weights.out;
    float* gain_sum = partial;
    float* offset_sum = partial + layer.ld;
    __builtin_memset(partial, 0, 2 * layer.ld * sizeof(float));
    for (int64_t i = range.first; i < range.first + range.rows; ++i) {
        float* delta = layer.delta + i * layer.ld;
        const float* normed = layer.normed + i * layer.ld;
        // Columns from n to the padded end must not enter the sums.
        for (int c = n; c < round_up(n, kLanes); ++c) delta[c] = 0.0f;
        vf mean = zero();
        vf along = zero();
        for (int c = 0; c < n; c += kLanes) {
            const vf d = load(delta + c);
            const vf x = load(normed + c);
            store(gain_sum + c, fma(d, x, load(gain_sum + c)));
            store(offset_sum + c, load(offset_sum + c) + d);
            const vf scaled = d * load(weights.gain + c);
            mean = mean + scaled;
            along = fma(scaled, x, along);
            store(delta + c, scaled);
        }
        const float scale = 1.0f / static_cast<float>(n);
        const vf shift = splat(sum(mean) * scale);
        const vf slope = splat(sum(along) * scale);
        const vf inverse_std = splat(layer.inverse_std[i]);
        for (int c = 0; c < n; c += kLanes) {
            const vf d = load(delta + c) - shift - load(normed + c) * slope;
            store(delta + c, d * inverse_std);
        }
    }
}

// Fills every hidden layer's delta of a row range, chunk c of the tape, from output_delta.
static inline void backward_range(const PackedLayer* layers, const Tape& tape,
                                  const RowRange& range, int64_t c) {
    for (int l = tape.num_layers - 2; l >= 0; --l) {
        const TapeLayer& layer = tape.hidden[l];
        const bool last = l + 2 == tape.num_layers;
        const ptrdiff_t ld = last ? tape.output_ld : tape.hidden[l + 1].ld;
        const float* from =
            (last ? tape.output_delta : tape.hidden[l + 1].delta) + range.first * ld;
        float* delta = layer.delta + range.first * layer.ld;
        const PackedLayer& weights = layers[l + 1];
        gemm_packed(range.rows, weights.in, 0, weights.out, weights.out, from, ld, weights.backward,
                    nullptr, delta, layer.ld);
        const float* slope = layer.slope + range.first * layer.ld;
        for (int i = 0; i < range.rows; ++i) {
            for (int k = 0; k < weights.in; k += kLanes) {
                const ptrdiff_t at = i * layer.ld + k;
                store(delta + at, load(delta + at) * load(slope + at));
            }
        }
        if (layers[l].gain)
            norm_backward(layers[l], layer, range, layer.partial + c * 2 * layer.ld);
    }
}

static inline void backward_rows(const PackedLayer* layers, const Tape& tape, int64_t c) {
    backward_range(layers, tape, tape.cut[c], c);
}

// Gradient with respect to the first layers[0].backward_columns inputs, written to
// input_gradient (B, ld) in whole panels.
static inline void input_gradient_rows(const PackedLayer* layers, const Tape& tape,
                                       const RowRange& range, float* input_gradient, ptrdiff_t ld) {
    const ptrdiff_t ldd = first_linear_ld(tape);
    const float* delta = tape.num_layers > 1 ? tape.hidden[0].delta : tape.output_delta;
    const PackedLayer& weights = layers[0];
    gemm_packed(range.rows, weights.backward_columns, 0, weights.out, weights.out,
                delta + range.first * ldd, ldd, weights.backward, nullptr,
                input_gradient + range.first * ld, ld);
}

// --- Weight gradients

// Rows as the words of a product over the batch: bfloat16 words hold two rows each.
struct BatchWords {
    const GemmWord* data;
    ptrdiff_t ld;
};

#if defined(FLAME_ISA_AVX512_BF16)
constexpr int kDeltaWords = kGradientDepth / kWordDepth * kGradientRows;

static inline BatchWords batch_words(int64_t rows, int columns, const float* x, ptrdiff_t ld,
                                     GemmWord* words, ptrdiff_t words_ld) {
    for (int64_t r = 0; r < rows; r += kWordDepth) {
        const float* even = x + r * ld;
        pair_rows(even, r + 1 < rows ? even + ld : nullptr, columns,
                  words + r / kWordDepth * words_ld);
    }
    return {words, words_ld};
}
#else
constexpr int kDeltaWords = 1;  // floats are read where they are

static inline BatchWords batch_words(int64_t, int, const float* x, ptrdiff_t ld, GemmWord*,
                                     ptrdiff_t) {
    return {x, ld};
}
#endif

// Asks for the next panel's lines while this one is multiplied: in place they lie a row apart,
// which no hardware prefetcher follows across pages.
FLAME_INLINE void prefetch_panel(const GemmWord* x, ptrdiff_t ldx, int first, int end) {
    constexpr int kLineWords = 16;
    for (int r = first; r < end; ++r) {
        for (int c = 0; c < kGemmCols; c += kLineWords) __builtin_prefetch(x + r * ldx + c);
    }
}

// gradient (count, in) += delta^T x over `depth` rows of words; x is readable to whole panels.
static inline void weight_gradient_pass(int depth, int count, int in, const BatchWords& delta,
                                        const BatchWords& x, float* gradient) {
    for (int column = 0; column < in; column += kGemmCols) {
        const int valid = in - column < kGemmCols ? in - column : kGemmCols;
        for (int i = 0; i < count; i += kGemmRows) {
            const int rows = count - i < kGemmRows ? count - i : kGemmRows;
            prefetch_panel(x.data + column + kGemmCols, x.ld, depth * i / count,
                           depth * (i + rows) / count);
            const GemmA block{delta.data + i, 1, delta.ld};
            float* to = gradient + static_cast<ptrdiff_t>(i) * in + column;
            if (valid == kGemmCols) {
                gemm_micro_rows<kGemmRows, true>(rows, depth, block, x.data + column, x.ld, nullptr,
                                                 0, to, in);
                continue;
            }
            float tile[kGemmRows * kGemmCols];
            gemm_micro_rows<kGemmRows>(rows, depth, block, x.data + column, x.ld, nullptr, 0, tile,
                                       kGemmCols);
            for (int r = 0; r < rows; ++r) {
                for (int c = 0; c < valid; ++c) to[r * in + c] += tile[r * kGemmCols + c];
            }
        }
    }
}

// gradient (out, in) rows [first, first + count) += delta^T x over all B rows. Each pass over
// kGradientDepth rows starts from zero and the passes are added up: summing thousands of rows into
// one float accumulator would lose several bits.
static inline void weight_gradient_block(int64_t rows, int first, int count, int in,
                                         const float* delta, ptrdiff_t ldd, const BatchWords& x,
                                         float* gradient) {
    GemmWord rounded[kDeltaWords];
    for (int64_t r = 0; r < rows; r += kGradientDepth) {
        const int depth = row_count(r, rows, kGradientDepth);
        const BatchWords d =
            batch_words(depth, count, delta + r * ldd + first, ldd, rounded, kGradientRows);
        weight_gradient_pass(depth_words(depth), count, in, d,
                             {x.data + r / kWordDepth * x.ld, x.ld},
                             gradient + static_cast<ptrdiff_t>(first) * in);
    }
}

// gradient[first + i] += sum over rows of delta, in four interleaved partial sums.
static inline void bias_gradient_block(int64_t rows, int first, int count, const float* delta,
                                       ptrdiff_t ldd, float* gradient) {
    float partial[4][kGradientRows] = {};
    for (int64_t r = 0; r < rows; ++r) {
        float* into = partial[r % 4];
        const float* d = delta + r * ldd + first;
        for (int i = 0; i < count; ++i) into[i] += d[i];
    }
    for (int i = 0; i < count; ++i) {
        gradient[first + i] += (partial[0][i] + partial[1][i]) + (partial[2][i] + partial[3][i]);
    }
}

// One layer's operands of the weight gradient.
struct LayerGradient {
    int64_t rows;  // rows of delta and x
    int in;
    int out;
    const float* delta;
    ptrdiff_t ldd;
    int64_t bias_rows;   // rows of the bias sum ...
    ptrdiff_t bias_ldd;  // ... and their distance
    const float* x;
    ptrdiff_t ldx;
    BatchWords words;  // x as run_layer_gradients prepares it
    float* weight;
    float* bias;
    const float* norm_partial;  // null without LayerNorm
    int64_t norm_chunks;
    ptrdiff_t norm_ld;
    float* gain;
    float* offset;
    int basis;  // leading inputs whose unit vectors are tangent inputs; 0 without tangents
};

static inline void norm_gradient_block(const LayerGradient& g, int first, int count) {
    for (int64_t c = 0; c < g.norm_chunks; ++c) {
        const float* partial = g.norm_partial + c * 2 * g.norm_ld + first;
        for (int i = 0; i < count; ++i) {
            g.gain[first + i] += partial[i];
            g.offset[first + i] += partial[g.norm_ld + i];
        }
    }
}

// Tangent j of a sample enters the first layer as column j of its weight; its delta lies j + 1 rows
// after the sample's own.
static inline void basis_gradient_block(const LayerGradient& g, int first, int count) {
    const ptrdiff_t row = g.bias_ldd / (1 + g.basis);
    float column[kGradientRows];
    for (int j = 0; j < g.basis; ++j) {
        __builtin_memset(column, 0, sizeof(column));
        bias_gradient_block(g.bias_rows, 0, count, g.delta + (1 + j) * row + first, g.bias_ldd,
                            column);
        for (int i = 0; i < count; ++i) {
            g.weight[static_cast<ptrdiff_t>(first + i) * g.in + j] += column[i];
        }
    }
}

FLAME_INLINE int gradient_blocks(int out) { return divide_up(out, kGradientRows); }

static inline void layer_gradient_block(const LayerGradient& g, int block) {
    const int first = block * kGradientRows;
    const int count = g.out - first < kGradientRows ? g.out - first : kGradientRows;
    weight_gradient_block(g.rows, first, count, g.in, g.delta, g.ldd, g.words, g.weight);
    bias_gradient_block(g.bias_rows, first, count, g.delta, g.bias_ldd, g.bias);
    if (g.norm_partial) norm_gradient_block(g, first, count);
    if (g.basis > 0) basis_gradient_block(g, first, count);
}

// Every layer's inputs as words, once for all blocks of output rows.
static inline void prepare_words(LayerGradient* layers, int count, Workspace& workspace) {
    GemmWord* memory[kMaxMembers * kMaxLayers] = {};
    for (int l = 0; l < count && kWordDepth > 1; ++l) {
        memory[l] = words(workspace, divide_up(layers[l].rows, kWordDepth) * layers[l].ldx);
    }
    parallel_for(count, kWordDepth > 1 ? 1 : count, [&](int64_t begin, int64_t end) {
        for (int64_t l = begin; l < end; ++l) {
            LayerGradient& g = layers[l];
            const int columns = round_up(g.in, kGemmCols);
            g.words = batch_words(g.rows, columns, g.x, g.ldx, memory[l], g.ldx);
        }
    });
}

// Runs the blocks of all given layers in parallel; every block owns its part of the gradient.
static inline void run_layer_gradients(LayerGradient* layers, int count) {
    Workspace workspace;
    prepare_words(layers, count, workspace);
    int64_t blocks = 0;
    for (int l = 0; l < count; ++l) blocks += gradient_blocks(layers[l].out);
    parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
        int l = 0;
        int64_t start = 0;
        for (int64_t b = begin; b < end; ++b) {
            while (b >= start + gradient_blocks(layers[l].out)) {
                start += gradient_blocks(layers[l].out);
                ++l;
            }
            layer_gradient_block(layers[l], static_cast<int>(b - start));
        }
    });
}

// The part of a layer's gradient that points into the flat gradient buffer.
static inline LayerGradient gradient_target(const MlpSpec& spec, int layer, int member,
                                            float* gradients) {
    const LayerOffsets at = layer_offsets(spec, layer);
    const size_t row = static_cast<size_t>(member) * spec.sizes[layer + 1];
    const bool norm = has_norm(spec, layer);
    LayerGradient g{};
    g.in = spec.sizes[layer];
    g.out = spec.sizes[layer + 1];
    g.weight = gradients + at.weight + row * g.in;
    g.bias = gradients + at.bias + row;
    g.gain = norm ? gradients + at.gain + row : nullptr;
    g.offset = norm ? gradients + at.offset + row : nullptr;
    return g;
}

// The layers of one member's tape; appends num_layers entries and returns the new count.
static inline int append_layer_gradients(const MlpSpec& spec, const Tape& tape, int member,
                                         const float* input, ptrdiff_t ldx, float* gradients,
                                         LayerGradient* list, int count) {
    for (int l = 0; l < spec.num_layers; ++l) {
        LayerGradient g = gradient_target(spec, l, member, gradients);
        const bool last = l + 1 == spec.num_layers;
        g.rows = tape.cut.rows;
        g.delta = last ? tape.output_delta : tape.hidden[l].delta;
        g.ldd = last ? tape.output_ld : tape.hidden[l].ld;
        g.bias_rows = g.rows;
        g.bias_ldd = g.ldd;
        g.x = l == 0 ? input : tape.hidden[l - 1].h;
        g.ldx = l == 0 ? ldx : tape.hidden[l - 1].ld;
        if (has_norm(spec, l)) {
            g.norm_partial = tape.hidden[l].partial;
            g.norm_chunks = tape.cut.chunks;
            g.norm_ld = tape.hidden[l].ld;
        }
        list[count++] = g;
    }
    return count;
}

// --- Ensembles: one tape per member, all of the same shape

// body(member, chunk of its tape) for all of them, in parallel.
template <typename Body>
static inline void for_member_chunks(const Tape* tapes, int members, Body&& body) {
    const int64_t chunks = tapes[0].cut.chunks;
    parallel_for(chunks * members, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) body(i / chunks, i % chunks);
    });
}

// Adds every member's weight gradients, from the tapes' deltas and the input they share.
static inline void add_member_gradients(const MlpSpec& spec, const Tape* tapes, const float* input,
                                        ptrdiff_t ldx, float* gradients) {
    LayerGradient list[kMaxMembers * kMaxLayers];
    int count = 0;
    for (int m = 0; m < spec.members; ++m) {
        count = append_layer_gradients(spec, tapes[m], m, input, ldx, gradients, list, count);
    }
    run_layer_gradients(list, count);
}

}  // namespace flame::FLAME_ISA
