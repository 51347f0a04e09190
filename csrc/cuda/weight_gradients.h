// Gradients of all parameters from a tape: per layer and member
//     weight (out, in) += delta^T x,   bias (out) += column sums of the values' delta,
//     gain, offset (out) += the tiles' partial sums.
//
// A block owns 64 x 64 of a weight (and, on the left edge, 64 of the vectors) and sums all rows in
// order, in passes of 128 that are added up: no atomics, and no float takes thousands of terms.
//
// Operations 2 rows sum(in out) per member: critics 3 x 256, 256 rows, two members 0.14 GFLOP,
// floor 2.1 us at 67 TFLOP/s; bytes: h and delta 3.1 MB, gradients 1.2 MB read and written, 1.6 us
// at 3.35 TB/s (most of it stays in L2).
#pragma once

#include "cuda/tape.h"
#include "partition.h"

namespace flame::FLAME_ISA {

constexpr int kGradientTile = 64;
constexpr int kGradientLd = kGradientTile + 4;
constexpr int kGradientSlab = 16;   // rows
constexpr int kGradientPass = 128;  // rows
constexpr int kGradientPart = kGradientSlab * kGradientTile / kThreads;
constexpr size_t kGradientShared = 4 * static_cast<size_t>(kGradientSlab) * kGradientLd;

struct GradientLayer {
    int in;
    int out;
    int blocks;  // per member
    const float* delta;
    int ldd;
    const float* x;
    int ldx;
    int64_t x_member;  // floats from member to member: zero for the input
    const float* partial;
    float* weight;
    float* bias;
    float* gain;
    float* offset;
};

struct GradientSums {
    float v[4][4];
};

struct GradientPart {
    float delta[kGradientPart];
    float x[kGradientPart];
};

struct WeightGradientsKernel {
    static constexpr const char* kName = "weight_gradients";
    int64_t rows;
    int group;  // a value and its tangents, which have no part in the bias
    int64_t tiles;
    int blocks;  // per member
    GradientLayer layers[kMaxLayers];

    FLAME_BODY void operator()(const Block& block) const {
        const int member = static_cast<int>(block.index / blocks);
        int rest = static_cast<int>(block.index % blocks);
        int l = 0;
        while (rest >= layers[l].blocks) rest -= layers[l++].blocks;
        const int across = divide_up(layers[l].in, kGradientTile);
        run_tile(block, member_pointers(layers[l], member), rest / across * kGradientTile,
                 rest % across * kGradientTile);
    }

    FLAME_BODY GradientLayer member_pointers(GradientLayer g, int member) const {
        const int64_t row = static_cast<int64_t>(member) * g.out;
        g.delta += member * rows * g.ldd;
        g.x += member * g.x_member;
        g.weight += row * g.in;
        g.bias += row;
        if (g.gain != nullptr) {
            g.gain += row;
            g.offset += row;
            g.partial += member * tiles * 2 * g.ldd;
        }
        return g;
    }

    FLAME_BODY GradientPart fetch(const GradientLayer& g, int64_t row, int o, int i,
                                  int thread) const {
        GradientPart part;
        FLAME_UNROLL
        for (int p = 0; p < kGradientPart; ++p) {
            const int e = thread + p * kThreads;
            const int64_t r = row + e / kGradientTile;
            const int n = e % kGradientTile;
            part.delta[p] = r < rows && o + n < g.out ? g.delta[r * g.ldd + o + n] : 0.0f;
            part.x[p] = r < rows && i + n < g.in ? g.x[r * g.ldx + i + n] : 0.0f;
        }
        return part;
    }

    // slab: delta (kGradientSlab, kGradientLd), then x likewise.
    static FLAME_BODY void put(const GradientPart& part, int thread, float* slab) {
        FLAME_UNROLL
        for (int p = 0; p < kGradientPart; ++p) {
            const int e = thread + p * kThreads;
            const int at = e / kGradientTile * kGradientLd + e % kGradientTile;
            slab[at] = part.delta[p];
            slab[kGradientSlab * kGradientLd + at] = part.x[p];
        }
    }

    static FLAME_BODY void add_slab(GradientSums& sums, const float* slab, int thread) {
        const float* delta = slab + 4 * (thread / 16);
        const float* x = slab + kGradientSlab * kGradientLd + 4 * (thread % 16);
        FLAME_UNROLL
        for (int k = 0; k < kGradientSlab; ++k) {
            const Vec4 left = load4(delta + k * kGradientLd);
            const Vec4 right = load4(x + k * kGradientLd);
            FLAME_UNROLL
            for (int o = 0; o < 4; ++o) {
                FLAME_UNROLL
                for (int i = 0; i < 4; ++i) {
                    sums.v[o][i] = fmaf(left.v[o], right.v[i], sums.v[o][i]);
                }
            }
        }
    }

    // Of a slab's column of deltas; `first` is its first value's row.
    FLAME_BODY float value_sum(const float* delta, int first) const {
        float sum = 0.0f;
        for (int k = first; k < kGradientSlab; k += group) sum += delta[k * kGradientLd];
        return sum;
    }

    // That row of the next slab: modulo the group a slab's length less.
    FLAME_BODY int next_value(int first) const {
        const int next = first + group - kGradientSlab % group;
        return next < group ? next : next - group;
    }

    static FLAME_BODY void finish_pass(GradientSums& total, GradientSums& pass) {
        FLAME_UNROLL
        for (int e = 0; e < 16; ++e) {
            total.v[e / 4][e % 4] += pass.v[e / 4][e % 4];
            pass.v[e / 4][e % 4] = 0.0f;
        }
    }

    FLAME_BODY void run_tile(const Block& block, const GradientLayer& g, int o, int i) const {
        PerThread<GradientSums> total;
        PerThread<GradientSums> pass;
        PerThread<float> bias;
        float* slab = block.shared;
        block.each_thread([&](int thread) {
            total[thread] = {};
            pass[thread] = {};
            bias[thread] = 0.0f;
            put(fetch(g, 0, o, i, thread), thread, slab);
        });
        int value = 0;
        for (int64_t row = 0; row < rows; row += kGradientSlab) {
            const int parity = static_cast<int>(row / kGradientSlab % 2);
            const float* present = slab + parity * (2 * kGradientSlab * kGradientLd);
            float* next = slab + (1 - parity) * (2 * kGradientSlab * kGradientLd);
            block.each_thread([&](int thread) {
                const GradientPart part = fetch(g, row + kGradientSlab, o, i, thread);
                add_slab(pass[thread], present, thread);
                if (i == 0 && thread < kGradientTile) {
                    bias[thread] += value_sum(present + thread, value);
                }
                if ((row + kGradientSlab) % kGradientPass == 0) {
                    finish_pass(total[thread], pass[thread]);
                }
                put(part, thread, next);
            });
            value = next_value(value);
        }
        block.each_thread([&](int thread) {
            finish_pass(total[thread], pass[thread]);
            store(g, total[thread], o + 4 * (thread / 16), i + 4 * (thread % 16));
            if (i == 0 && thread < kGradientTile && o + thread < g.out) {
                store_vectors(g, o + thread, bias[thread]);
            }
        });
    }

    static FLAME_BODY void store(const GradientLayer& g, const GradientSums& sums, int o, int i) {
        FLAME_UNROLL
        for (int e = 0; e < 16; ++e) {
            const int row = o + e / 4;
            const int column = i + e % 4;
            if (row < g.out && column < g.in) {
                g.weight[static_cast<int64_t>(row) * g.in + column] += sums.v[e / 4][e % 4];
            }
        }
    }

    FLAME_BODY void store_vectors(const GradientLayer& g, int o, float bias) const {
        g.bias[o] += bias;
        if (g.gain == nullptr) return;
        float gain = 0.0f;
        float offset = 0.0f;
        for (int64_t t = 0; t < tiles; ++t) {
            gain += g.partial[(2 * t) * g.ldd + o];
            offset += g.partial[(2 * t + 1) * g.ldd + o];
        }
        g.gain[o] += gain;
        g.offset[o] += offset;
    }
};

static inline GradientLayer gradient_layer(const MlpSpec& spec, const Tape& tape, int l,
                                           float* gradients) {
    const LayerOffsets at = layer_offsets(spec, l);
    const bool last = l + 1 == spec.num_layers;
    const bool norm = has_norm(spec, l);
    GradientLayer g{};
    g.in = spec.sizes[l];
    g.out = spec.sizes[l + 1];
    g.blocks = divide_up(g.in, kGradientTile) * divide_up(g.out, kGradientTile);
    g.delta = last ? tape.output_delta : tape.hidden[l].delta;
    g.ldd = last ? g.out : tape.hidden[l].ld;
    g.x = l == 0 ? tape.input : tape.hidden[l - 1].h;
    g.ldx = l == 0 ? tape.input_ld : tape.hidden[l - 1].ld;
    g.x_member = l == 0 ? 0 : tape.samples * tape.group * g.ldx;
    g.partial = norm ? tape.hidden[l].partial : nullptr;
    g.weight = gradients + at.weight;
    g.bias = gradients + at.bias;
    g.gain = norm ? gradients + at.gain : nullptr;
    g.offset = norm ? gradients + at.offset : nullptr;
    return g;
}

static inline void weight_gradients(const Launcher& launch, const MlpSpec& spec, const Tape& tape,
                                    float* gradients) {
    WeightGradientsKernel kernel{};
    kernel.rows = tape.samples * tape.group;
    kernel.group = tape.group;
    kernel.tiles = tape.tiles;
    for (int l = 0; l < spec.num_layers; ++l) {
        kernel.layers[l] = gradient_layer(spec, tape, l, gradients);
        kernel.blocks += kernel.layers[l].blocks;
    }
    launch(kernel, static_cast<int64_t>(kernel.blocks) * spec.members, kGradientShared);
}

}  // namespace flame::FLAME_ISA
