// An ensemble's weights in the order the microkernel reads them; rebuilt in every call, since a
// training step changes the weights (270 thousand floats, about 2 % of a critic step).
#pragma once

#include <cstring>

#include "cpu/gemm.h"
#include "cpu/workspace.h"
#include "mlp_spec.h"
#include "thread_pool.h"

namespace flame::FLAME_ISA {

struct PackedLayer {
    int in;
    int out;
    const float* forward;   // pack_transposed
    const float* backward;  // pack_plain, null where not asked for
    int backward_columns;   // inputs that `backward` covers
    const float* bias;      // padded with zeros to whole panels, like gain and offset
    const float* gain;      // null without LayerNorm
    const float* offset;
};

struct PackedMlp {
    int members;
    int num_layers;
    PackedLayer layers[kMaxMembers][kMaxLayers];
};

struct PackOptions {
    bool backward;      // also pack for gradients with respect to hidden layers
    int input_columns;  // and to this many leading input columns
};

static inline int backward_columns(const MlpSpec& spec, int layer, const PackOptions& options) {
    if (layer == 0) return options.input_columns;
    return options.backward ? spec.sizes[layer] : 0;
}

static inline const float* copy_padded(const float* from, int n, Workspace& workspace) {
    const int padded = padded_columns(n);
    float* to = workspace.floats(padded);
    std::memcpy(to, from, n * sizeof(float));
    std::memset(to + n, 0, (padded - n) * sizeof(float));
    return to;
}

static inline void pack_mlp(const MlpSpec& spec, const float* parameters,
                            const PackOptions& options, Workspace& workspace, PackedMlp& packed) {
    packed.members = spec.members;
    packed.num_layers = spec.num_layers;
    for (int l = 0; l < spec.num_layers; ++l) {
        const LayerOffsets at = layer_offsets(spec, l);
        const int in = spec.sizes[l];
        const int out = spec.sizes[l + 1];
        const int columns = backward_columns(spec, l, options);
        for (int m = 0; m < spec.members; ++m) {
            PackedLayer& layer = packed.layers[m][l];
            const float* weight = parameters + at.weight + static_cast<size_t>(m) * out * in;
            const size_t row = static_cast<size_t>(m) * out;
            float* forward = workspace.floats(packed_size(out, in));
            pack_transposed(weight, out, in, forward);
            float* backward = columns > 0 ? workspace.floats(packed_size(columns, out)) : nullptr;
            if (backward) pack_plain(weight, out, in, columns, backward);
            const bool norm = has_norm(spec, l);
            layer = PackedLayer{
                in,
                out,
                forward,
                backward,
                columns,
                copy_padded(parameters + at.bias + row, out, workspace),
                norm ? copy_padded(parameters + at.gain + row, out, workspace) : nullptr,
                norm ? copy_padded(parameters + at.offset + row, out, workspace) : nullptr};
        }
    }
}

}  // namespace flame::FLAME_ISA
