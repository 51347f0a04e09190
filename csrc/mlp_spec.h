// Shapes and offsets of an MLP ensemble's flat parameter buffer: the C++ side of
// flame_ext/networks.py, which tells the layout in words.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "api.h"
#include "partition.h"

namespace flame {

constexpr int kMaxLayers = 8;
constexpr int kMaxMembers = 16;
constexpr int kMaxActionColumns = 64;
constexpr int kMaxWidth = 4096;
constexpr int kParameterAlignment = 16;  // floats
constexpr float kLayerNormEps = 1e-5f;

// sizes[0] inputs, sizes[1 .. num_layers - 1] hidden widths, sizes[num_layers] outputs.
struct MlpSpec {
    int32_t members;
    int32_t num_layers;
    int32_t sizes[kMaxLayers + 1];
    Activation activation;
    bool layer_norm;
    bool bfloat16;  // CPU kernels round the factors of products to it; sums stay float32
};

// Positions in floats of one layer's tensors; each holds all members. gain and offset are valid
// only where has_norm().
struct LayerOffsets {
    size_t weight;
    size_t bias;
    size_t gain;
    size_t offset;
    size_t end;
};

static inline int outputs(const MlpSpec& spec) { return spec.sizes[spec.num_layers]; }

static inline bool has_norm(const MlpSpec& spec, int layer) {
    return spec.layer_norm && layer + 1 < spec.num_layers;
}

static inline size_t aligned_size(size_t floats) { return round_up(floats, kParameterAlignment); }

static inline LayerOffsets layer_offsets(const MlpSpec& spec, int layer) {
    LayerOffsets o{};
    for (int l = 0; l <= layer; ++l) {
        const size_t out = static_cast<size_t>(spec.members) * spec.sizes[l + 1];
        o.weight = o.end;
        o.bias = o.weight + aligned_size(out * spec.sizes[l]);
        o.gain = o.bias + aligned_size(out);
        o.offset = has_norm(spec, l) ? o.gain + aligned_size(out) : o.gain;
        o.end = has_norm(spec, l) ? o.offset + aligned_size(out) : o.gain;
    }
    return o;
}

static inline size_t parameter_count(const MlpSpec& spec) {
    return layer_offsets(spec, spec.num_layers - 1).end;
}

}  // namespace flame
