// An MLP ensemble as kernels see it: pointers into the flat buffer and sizes, passed by value.
#pragma once

#include "cuda/target.h"
#include "mlp_spec.h"
#include "partition.h"

namespace flame::FLAME_ISA {

constexpr int kPadding = 16;  // floats: rows of activations end at a multiple of it

static inline FLAME_ANYWHERE int padded(int columns) { return round_up(columns, kPadding); }

struct LayerView {
    const float* weight;  // (out, in)
    const float* bias;    // (out)
    const float* gain;    // (out) or null, like offset
    const float* offset;
    int in;
    int out;
};

struct MlpView {
    int members;
    int num_layers;
    Activation activation;
    LayerView layers[kMaxLayers];  // of member 0
};

FLAME_INLINE LayerView member_layer(const MlpView& net, int layer, int member) {
    LayerView v = net.layers[layer];
    const int64_t row = static_cast<int64_t>(member) * v.out;
    v.weight += row * v.in;
    v.bias += row;
    if (v.gain != nullptr) {
        v.gain += row;
        v.offset += row;
    }
    return v;
}

// --- Host side

static inline MlpView make_view(const MlpSpec& spec, const float* parameters) {
    MlpView net{};
    net.members = spec.members;
    net.num_layers = spec.num_layers;
    net.activation = spec.activation;
    for (int l = 0; l < spec.num_layers; ++l) {
        const LayerOffsets at = layer_offsets(spec, l);
        const bool norm = has_norm(spec, l);
        net.layers[l] = {parameters + at.weight,
                         parameters + at.bias,
                         norm ? parameters + at.gain : nullptr,
                         norm ? parameters + at.offset : nullptr,
                         spec.sizes[l],
                         spec.sizes[l + 1]};
    }
    return net;
}

}  // namespace flame::FLAME_ISA
