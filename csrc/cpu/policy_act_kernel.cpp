// Acting on one range of rows, for one instruction set.
//
// What it must move and compute, for a 3 x 256 policy at batch 1: every weight once, 4 or 2 bytes
// each (HalfCheetah 0.56 MB in fp32), 2 operations per weight. So one row is bound by the bandwidth
// of the cache that holds the weights, and they lie in the order in which it reads them, one
// stream. For many rows it is bound by the FMA units: a tile's columns stay in L1 while the rows
// pass.
//
// Numerics: a row's result is the same for every way of cutting the rows into ranges.
#include "cpu/policy_act_kernel.h"

#include <math.h>

#include "cpu/simd.h"
#include "embedding_scale.h"
#include "mlp_activation.h"
#include "mlp_spec.h"
#include "partition.h"
#include "philox.h"
#include "scalar_rules.h"

namespace flame::FLAME_ISA {
namespace {

// Vectors of outputs that one row, or a tile of rows, computes together.
#if defined(FLAME_ISA_AVX512)
constexpr int kRowVecs = 4;                  // a whole panel
constexpr int kTileRows = 6, kTileVecs = 4;  // 24 of 32 registers accumulate
#elif defined(FLAME_ISA_AVX2)
constexpr int kRowVecs = 8;                  // a whole panel
constexpr int kTileRows = 6, kTileVecs = 2;  // 12 of 16
#else
constexpr int kRowVecs = 8;                  // half a panel
constexpr int kTileRows = 2, kTileVecs = 4;  // 8 of 16
#endif

// Where vector v of kVecs outputs (or inputs) that begin `done` behind a whole block lies. Of words
// with two, the lower halves come first: a whole block's vectors are in the order of its elements.
template <Precision kPrecision, int kVecs>
FLAME_INLINE int place(int done, int v) {
    if constexpr (kPrecision != Precision::kBfloat) return done + v * kLanes;
    constexpr int kWordVecs = kVecs / 2;
    const int word = done / 2 + v % kWordVecs * kLanes;
    return word / kBfloatWords * kBlock + v / kWordVecs * kBfloatWords + word % kBfloatWords;
}

// The kVecs vectors of weights from `index` on, in the order of place().
template <Precision kPrecision, int kVecs>
FLAME_INLINE void load_weights(const void* weight, int64_t index, vf* to) {
    if constexpr (kPrecision == Precision::kBfloat) {
        static_assert(kVecs % 2 == 0, "a word holds weights of two vectors");
        const auto* words = static_cast<const uint32_t*>(weight) + index / 2;
        for (int v = 0; v < kVecs / 2; ++v) {
            load_bfloat_pairs(words + v * kLanes, to[v], to[kVecs / 2 + v]);
        }
    } else {
        for (int v = 0; v < kVecs; ++v) {
            const int64_t at = index + v * kLanes;
            if constexpr (kPrecision == Precision::kHalf) {
                to[v] = load_half(static_cast<const uint16_t*>(weight) + at);
            } else {
                to[v] = load(static_cast<const float*>(weight) + at);
            }
        }
    }
}

// What happens to a layer's sums before they are stored.
enum class Finish { kNone, kRelu, kSilu, kMish };

FLAME_INLINE Finish finish_of(const ActNet& net) {
    if (net.activation == Activation::kRelu) return Finish::kRelu;
    return net.activation == Activation::kSilu ? Finish::kSilu : Finish::kMish;
}

FLAME_INLINE vf apply(Finish finish, vf x) {
    switch (finish) {
        case Finish::kRelu:
            return HiddenActivation<Activation::kRelu>::value(x);
        case Finish::kSilu:
            return HiddenActivation<Activation::kSilu>::value(x);
        case Finish::kMish:
            return HiddenActivation<Activation::kMish>::value(x);
        default:
            return x;
    }
}

// What a row's sums start from. In the first layer that is its state's row, which `share` rows have
// in common; the tile begins `offset` rows into the first state.
struct Rows {
    const float* data;
    int64_t ld;
    int32_t offset;
    int32_t share;

    const float* row(int64_t i) const {
        return share == 1 ? data + i * ld : data + (offset + static_cast<int32_t>(i)) / share * ld;
    }
};

FLAME_INLINE Rows same_row(const float* data) { return {data, 0, 0, 1}; }

// --- Hidden layers

// A panel's outputs from `done` on: weight k of output j is weight[begin + k * ld + j].
struct Columns {
    const void* weight;
    int64_t begin;  // index of the panel's first weight
    int64_t ld;
    int output;  // of the layer, the panel's first
    int done;
    int inputs;
};

// kRows rows of kVecs vectors of outputs: their sums are independent, which hides the FMA latency.
template <int kRows, int kVecs, Precision kPrecision>
FLAME_INLINE void products(const Columns& c, const float* x, int64_t ldx, const Rows& init,
                           int64_t row, float* y, int64_t ldy, Finish finish) {
    vf acc[kRows][kVecs];
    for (int r = 0; r < kRows; ++r) {
        const float* from = init.row(row + r) + c.output;
        for (int v = 0; v < kVecs; ++v)
            acc[r][v] = load(from + place<kPrecision, kVecs>(c.done, v));
    }
    x += row * ldx;
    int64_t at = c.begin + c.done;
    for (int k = 0; k < c.inputs; ++k, at += c.ld) {
        vf b[kVecs];
        load_weights<kPrecision, kVecs>(c.weight, at, b);
        for (int r = 0; r < kRows; ++r) {
            const vf a = splat(x[r * ldx + k]);
            for (int v = 0; v < kVecs; ++v) acc[r][v] = fma(a, b[v], acc[r][v]);
        }
    }
    for (int r = 0; r < kRows; ++r) {
        float* to = y + (row + r) * ldy + c.output;
        for (int v = 0; v < kVecs; ++v) {
            store(to + place<kPrecision, kVecs>(c.done, v), apply(finish, acc[r][v]));
        }
    }
}

template <int kRows, int kVecs, Precision kPrecision>
__attribute__((noinline)) void tile(const Columns& c, const float* x, int64_t ldx, const Rows& init,
                                    int64_t row, float* y, int64_t ldy, Finish finish) {
    products<kRows, kVecs, kPrecision>(c, x, ldx, init, row, y, ldy, finish);
}

template <int kRows, int kVecs, Precision kPrecision>
FLAME_INLINE void dispatch_tile(int rows, const Columns& c, const float* x, int64_t ldx,
                                const Rows& init, int64_t row, float* y, int64_t ldy,
                                Finish finish) {
    if (rows == kRows) {
        tile<kRows, kVecs, kPrecision>(c, x, ldx, init, row, y, ldy, finish);
    } else if constexpr (kRows > 1) {
        dispatch_tile<kRows - 1, kVecs, kPrecision>(rows, c, x, ldx, init, row, y, ldy, finish);
    }
}

// Row tiles of nearly equal height: 32 rows are 6 6 5 5 5 5, not 6 6 6 6 6 2.
template <int kVecs, Precision kPrecision>
FLAME_INLINE void all_rows(const Columns& c, int rows, const float* x, int64_t ldx,
                           const Rows& init, float* y, int64_t ldy, Finish finish) {
    const int tiles = divide_up(rows, kTileRows);
    for (int t = 0; t < tiles; ++t) {
        const int begin = rows * t / tiles;
        const int end = rows * (t + 1) / tiles;
        dispatch_tile<kTileRows, kVecs, kPrecision>(end - begin, c, x, ldx, init, begin, y, ldy,
                                                    finish);
    }
}

// A panel's outputs, kVecs vectors at a time and what is left in fewer.
template <int kVecs, Precision kPrecision, bool kOneRow>
FLAME_INLINE void panel(Columns c, int rows, const float* x, int64_t ldx, const Rows& init,
                        float* y, int64_t ldy, Finish finish) {
    constexpr int kOutputs = kVecs * kLanes;
    for (; c.done + kOutputs <= c.ld; c.done += kOutputs) {
        if constexpr (kOneRow) {
            products<1, kVecs, kPrecision>(c, x, ldx, init, 0, y, ldy, finish);
        } else {
            all_rows<kVecs, kPrecision>(c, rows, x, ldx, init, y, ldy, finish);
        }
    }
    if constexpr (kOutputs > kBlock) {
        panel<kVecs / 2, kPrecision, kOneRow>(c, rows, x, ldx, init, y, ldy, finish);
    }
}

template <Precision kPrecision>
void layer_rows(const ActLayer& layer, int rows, const float* x, int64_t ldx, const Rows& init,
                float* y, int64_t ldy, Finish finish) {
    const int outputs = padded(layer.outputs);
    for (int o = 0; o < outputs; o += kPanel) {
        const Columns c = {layer.weight,
                           static_cast<int64_t>(o) * layer.inputs,
                           row_count(o, outputs, kPanel),
                           o,
                           0,
                           layer.inputs};
        if (rows == 1) {
            panel<kRowVecs, kPrecision, true>(c, 1, x, ldx, init, y, ldy, finish);
        } else {
            panel<kTileVecs, kPrecision, false>(c, rows, x, ldx, init, y, ldy, finish);
        }
    }
}

// LayerNorm of each row's `layer.outputs` columns, then the activation; padding columns become 0.
void normalise_rows(const ActLayer& layer, int rows, float* y, int64_t ldy, Finish finish) {
    const int width = layer.outputs;
    const int vec_end = width / kLanes * kLanes;
    for (int r = 0; r < rows; ++r) {
        float* row = y + r * ldy;
        vf sums = zero();
        for (int j = 0; j < vec_end; j += kLanes) sums += load(row + j);
        float mean = sum(sums);
        for (int j = vec_end; j < width; ++j) mean += row[j];
        mean /= static_cast<float>(width);
        vf squares = zero();
        for (int j = 0; j < vec_end; j += kLanes) {
            const vf d = load(row + j) - mean;
            squares = fma(d, d, squares);
        }
        float variance = sum(squares);
        for (int j = vec_end; j < width; ++j) variance += (row[j] - mean) * (row[j] - mean);
        variance /= static_cast<float>(width);
        const float scale = 1.0f / __builtin_sqrtf(variance + kLayerNormEps);
        for (int j = 0; j < padded(width); j += kLanes) {
            const vf normed = (load(row + j) - mean) * scale;
            const vf z = fma(normed, load(layer.gain + j), load(layer.offset + j));
            store(row + j, apply(finish, z));
        }
    }
}

// --- Output layer

// y = x W^T + bias, row by row, four outputs at a time; x is zero up to padded(inputs).
template <Precision kPrecision>
void output_rows(const ActLayer& layer, int rows, const float* x, int64_t ldx, float* y,
                 int64_t ldy) {
    constexpr int kGroup = 4;
    constexpr int kVecs = kBlock / kLanes;
    const int inputs = padded(layer.inputs);
    for (int r = 0; r < rows; ++r) {
        const float* row = x + r * ldx;
        for (int o = 0; o < layer.outputs; o += kGroup) {
            const int count = layer.outputs - o < kGroup ? layer.outputs - o : kGroup;
            int64_t base[kGroup];
            vf acc[kGroup];
            for (int j = 0; j < kGroup; ++j) {
                base[j] = static_cast<int64_t>(o + (j < count ? j : 0)) * inputs;
                acc[j] = zero();
            }
            for (int k = 0; k < inputs; k += kVecs * kLanes) {
                vf a[kVecs];
                for (int v = 0; v < kVecs; ++v) a[v] = load(row + place<kPrecision, kVecs>(k, v));
                for (int j = 0; j < kGroup; ++j) {
                    vf b[kVecs];
                    load_weights<kPrecision, kVecs>(layer.weight, base[j] + k, b);
                    for (int v = 0; v < kVecs; ++v) acc[j] = fma(a[v], b[v], acc[j]);
                }
            }
            for (int j = 0; j < count; ++j) y[r * ldy + o + j] = sum(acc[j]) + layer.bias[o + j];
        }
    }
}

// --- Whole networks

// Rows [row, row + rows) of the call and the states that they belong to.
struct Range {
    int64_t row, state;
    int rows, states;
};

struct TileMemory {
    int64_t ld;     // task.width
    float* pre;     // (states of the tile, ld): observation part of the first layer
    float* first;   // the same plus the step's bias
    float* h0;      // (tile, ld)
    float* h1;      // (tile, ld)
    float* out;     // (tile, outputs)
    float* states;  // (states of the tile, O + Z), with embeddings
    float* seen;    // (tile, A + Z), likewise
};

// The range's states as networks take them.
struct States {
    const float* data;
    int64_t ld;
};

// The observation part of the first layer for the range's states.
template <Precision kPrecision>
FLAME_INLINE void observe(const ActNet& net, const States& states, const Range& range,
                          const TileMemory& w) {
    layer_rows<kPrecision>(net.obs, range.states, states.data, states.ld, same_row(net.obs.bias),
                           w.pre, w.ld, Finish::kNone);
}

// Everything behind the observation part: z (rows, ldz) to out (rows, ldo).
template <Precision kPrecision>
void evaluate(const ActNet& net, int rows, const float* z, int64_t ldz, const Rows& pre,
              const TileMemory& w, float* out, int64_t ldo) {
    const Finish finish = finish_of(net);
    const bool norm = net.action.gain != nullptr;
    const Finish direct = norm ? Finish::kNone : finish;
    layer_rows<kPrecision>(net.action, rows, z, ldz, pre, w.h0, w.ld, direct);
    if (norm) normalise_rows(net.action, rows, w.h0, w.ld, finish);
    float* x = w.h0;
    float* y = w.h1;
    for (int i = 0; i < net.num_hidden; ++i) {
        const ActLayer& layer = net.hidden[i];
        layer_rows<kPrecision>(layer, rows, x, w.ld, same_row(layer.bias), y, w.ld, direct);
        if (norm) normalise_rows(layer, rows, y, w.ld, finish);
        float* swap = x;
        x = y;
        y = swap;
    }
    output_rows<kPrecision>(net.output, rows, x, w.ld, out, ldo);
}

FLAME_INLINE Rows state_rows(const ActTask& task, const Range& range, const TileMemory& w) {
    return {w.first, w.ld, static_cast<int32_t>(range.row % task.num_particles),
            static_cast<int32_t>(task.num_particles)};
}

FLAME_INLINE void add_bias(const ActNet& net, int step, int states, const TileMemory& w) {
    const int width = padded(net.obs.outputs);
    const float* bias = net.first_bias + static_cast<int64_t>(step) * width;
    for (int s = 0; s < states; ++s) {
        for (int j = 0; j < width; j += kLanes) {
            store(w.first + s * w.ld + j, load(w.pre + s * w.ld + j) + load(bias + j));
        }
    }
}

// A network that sees states only: a row is a state.
template <Precision kPrecision>
FLAME_INLINE void evaluate_states(const ActNet& net, const States& states, const Range& range,
                                  const TileMemory& w, float* out, int64_t ldo) {
    observe<kPrecision>(net, states, range, w);
    add_bias(net, 0, range.states, w);
    evaluate<kPrecision>(net, range.states, nullptr, 0, {w.first, w.ld, 0, 1}, w, out, ldo);
}

// --- Learned embeddings

// [observation | zs] of the range's states.
template <Precision kPrecision>
States embedded_states(const ActTask& task, const States& plain, const Range& range,
                       const TileMemory& w) {
    const int z = task.embedding_dim;
    const int64_t ld = act_state_columns(task);
    evaluate_states<kPrecision>(*task.state_encoder, plain, range, w, w.out, z);
    for (int s = 0; s < range.states; ++s) {
        float* to = w.states + s * ld;
        const float* features = w.out + static_cast<int64_t>(s) * z;
        const float scale = embedding_scale(features, z, task.embedding_min_scale);
        for (int j = 0; j < task.obs_dim; ++j) to[j] = plain.data[s * plain.ld + j];
        for (int j = 0; j < z; ++j) to[task.obs_dim + j] = features[j] / scale;
    }
    return {w.states, ld};
}

// [action | zsa] of the range's rows.
const float* embedded_actions(const ActTask& task, const States& states, const Range& range,
                              const float* action, const TileMemory& w) {
    const int z = task.embedding_dim;
    const int64_t ld = act_seen_columns(task);
    const ActNet& net = *task.pair_encoder;
    observe<Precision::kFloat>(net, {states.data + task.obs_dim, states.ld}, range, w);
    add_bias(net, 0, range.states, w);
    evaluate<Precision::kFloat>(net, range.rows, action, task.action_dim,
                                state_rows(task, range, w), w, w.out, z);
    for (int r = 0; r < range.rows; ++r) {
        float* to = w.seen + r * ld;
        __builtin_memcpy(to, action + r * task.action_dim, task.action_dim * sizeof(float));
        __builtin_memcpy(to + task.action_dim, w.out + static_cast<int64_t>(r) * z,
                         z * sizeof(float));
    }
    return w.seen;
}

// --- Actions and values

template <Precision kPrecision>
void flow_actions(const ActTask& task, const States& states, const Range& range,
                  const TileMemory& w, float* z) {
    const ActNet& net = *task.policy;
    const int dim = task.action_dim;
    observe<kPrecision>(net, states, range, w);
    for (int step = 0; step < task.num_steps; ++step) {
        add_bias(net, step, range.states, w);
        const Rows pre = state_rows(task, range, w);
        evaluate<kPrecision>(net, range.rows, z, dim, pre, w, w.out, dim);
        const ActStep s = task.steps[step];
        for (int i = 0; i < range.rows * dim; ++i) z[i] = after_step(s, z[i], w.out[i]);
    }
    for (int i = 0; i < range.rows * dim; ++i) z[i] = into_box(z[i]);
}

// The network sees states only; every particle of a state shares its mean and deviation.
template <Precision kPrecision>
void gaussian_actions(const ActTask& task, const States& states, const Range& range,
                      const TileMemory& w, float* z) {
    const int dim = task.action_dim;
    evaluate_states<kPrecision>(*task.policy, states, range, w, w.out, 2 * dim);
    const float span = 0.5f * (task.log_std_max - task.log_std_min);
    for (int r = 0; r < range.rows; ++r) {
        const int64_t state = (range.row + r) / task.num_particles - range.state;
        const float* mean = w.out + state * 2 * dim;
        for (int j = 0; j < dim; ++j) {
            const float log_std = task.log_std_min + span * (tanhf(mean[dim + j]) + 1.0f);
            z[r * dim + j] = tanhf(mean[j] + expf(log_std) * z[r * dim + j]);
        }
    }
}

template <Precision kPrecision>
void policy_actions(const ActTask& task, const States& states, const Range& range,
                    const TileMemory& w, float* z) {
    const int64_t first = range.row * task.action_dim;
    const int64_t count = static_cast<int64_t>(range.rows) * task.action_dim;
    if (task.noise != nullptr) {
        for (int64_t i = 0; i < count; ++i) z[i] = task.noise[first + i];
    } else {
        fill_normal(task.key.seed, task.key.stream, task.key.offset, static_cast<uint64_t>(first),
                    static_cast<uint64_t>(count), z);
    }
    if (task.kind == PolicyKind::kFlow) {
        flow_actions<kPrecision>(task, states, range, w, z);
    } else {
        gaussian_actions<kPrecision>(task, states, range, w, z);
    }
}

// Always fp32: best-of-N compares values that lie close together, and N rows are not
// bandwidth-bound.
void critic_values(const ActTask& task, const States& states, const Range& range,
                   const TileMemory& w, const float* action) {
    const bool embedded = task.pair_encoder != nullptr;
    const float* seen = embedded ? embedded_actions(task, states, range, action, w) : action;
    const int64_t columns = embedded ? act_seen_columns(task) : task.action_dim;
    float* q = task.q + range.row;
    for (int c = 0; c < task.num_critics; ++c) {
        const ActNet& net = task.critics[c];
        observe<Precision::kFloat>(net, states, range, w);
        add_bias(net, 0, range.states, w);
        const Rows pre = state_rows(task, range, w);
        evaluate<Precision::kFloat>(net, range.rows, seen, columns, pre, w, w.out, 1);
        for (int r = 0; r < range.rows; ++r) {
            if (c == 0 || takes_minimum(w.out[r], q[r])) q[r] = w.out[r];
        }
    }
}

template <Precision kPrecision>
void act_tile(const ActTask& task, const Range& range, const TileMemory& w) {
    float* z = task.action + range.row * task.action_dim;
    States states = {task.obs + range.state * task.obs_ld, task.obs_ld};
    if (task.state_encoder != nullptr) states = embedded_states<kPrecision>(task, states, range, w);
    if (task.policy != nullptr) policy_actions<kPrecision>(task, states, range, w, z);
    if (task.q != nullptr) critic_values(task, states, range, w, z);
}

}  // namespace

void policy_act(const ActTask& task, int64_t begin, int64_t end, float* workspace) {
    const int64_t block = static_cast<int64_t>(kActTileRows) * task.width;
    float* out = workspace + 4 * block;
    float* states = out + kActTileRows * act_output_columns(task);
    const TileMemory w = {task.width,
                          workspace,
                          workspace + block,
                          workspace + 2 * block,
                          workspace + 3 * block,
                          out,
                          states,
                          states + kActTileRows * act_state_columns(task)};
    for (int64_t row = begin; row < end; row += kActTileRows) {
        Range range;
        range.row = row;
        range.rows = static_cast<int>(end - row < kActTileRows ? end - row : kActTileRows);
        range.state = row / task.num_particles;
        range.states =
            static_cast<int>((row + range.rows - 1) / task.num_particles - range.state + 1);
        switch (task.precision) {
            case Precision::kFloat:
                act_tile<Precision::kFloat>(task, range, w);
                break;
            case Precision::kHalf:
                act_tile<Precision::kHalf>(task, range, w);
                break;
            case Precision::kBfloat:
                act_tile<Precision::kBfloat>(task, range, w);
                break;
        }
    }
}

}  // namespace flame::FLAME_ISA
