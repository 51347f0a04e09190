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
    const GemmWord* forward;   // pack_transposed
    const GemmWord* backward;  // pack_plain, null where not asked for
    int backward_columns;      // inputs that `backward` covers
    const float* bias;         // padded with zeros to whole panels, like gain and offset
    const float* gain;         // null without LayerNorm
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

static inline GemmWord* words(Workspace& workspace, size_t count) {
    return static_cast<GemmWord*>(workspace.bytes(count * sizeof(GemmWord)));
}

static inline const float* copy_padded(const float* from, int n, Workspace& workspace) {
    const int padded = padded_columns(n);
    float* to = workspace.floats(padded);
    std::memcpy(to, from, n * sizeof(float));
    std::memset(to + n, 0, (padded - n) * sizeof(float));
    return to;
}

// One weight matrix to pack, both ways.
struct PackTask {
    const float* weight;
    int in;
    int out;
    int columns;
    GemmWord* forward;
    GemmWord* backward;
};

// Matrices differ in size, so each is cut into parts for the threads.
constexpr int kPackParts = 4;

// Panels of `width` columns that belong to one part.
struct PanelRange {
    int first;    // column
    int columns;  // 0 for none
};

static inline PanelRange part_of(int width, int part) {
    const int panels = panel_count(width);
    const int first = panels * part / kPackParts * kGemmCols;
    const int end = panels * (part + 1) / kPackParts * kGemmCols;
    return {first, (end < width ? end : width) - first};
}

static inline void run_pack_task(const PackTask& t, int part) {
    const PanelRange outputs = part_of(t.out, part);
    pack_transposed(t.weight + static_cast<ptrdiff_t>(outputs.first) * t.in, outputs.columns, t.in,
                    t.forward + static_cast<ptrdiff_t>(outputs.first) * depth_words(t.in));
    if (!t.backward) return;
    const PanelRange inputs = part_of(t.columns, part);
    pack_plain(t.weight + inputs.first, t.out, t.in, inputs.columns,
               t.backward + static_cast<ptrdiff_t>(inputs.first) * depth_words(t.out));
}

static inline void pack_mlp(const MlpSpec& spec, const float* parameters,
                            const PackOptions& options, Workspace& workspace, PackedMlp& packed) {
    packed.members = spec.members;
    packed.num_layers = spec.num_layers;
    PackTask tasks[kMaxMembers * kMaxLayers];
    int count = 0;
    for (int l = 0; l < spec.num_layers; ++l) {
        const LayerOffsets at = layer_offsets(spec, l);
        const int in = spec.sizes[l];
        const int out = spec.sizes[l + 1];
        const int columns = backward_columns(spec, l, options);
        for (int m = 0; m < spec.members; ++m) {
            PackedLayer& layer = packed.layers[m][l];
            const float* weight = parameters + at.weight + static_cast<size_t>(m) * out * in;
            const size_t row = static_cast<size_t>(m) * out;
            GemmWord* forward = words(workspace, packed_size(out, in));
            GemmWord* backward =
                columns > 0 ? words(workspace, packed_size(columns, out)) : nullptr;
            tasks[count++] = {weight, in, out, columns, forward, backward};
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
    parallel_for(count * kPackParts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) run_pack_task(tasks[i / kPackParts], i % kPackParts);
    });
}

}  // namespace flame::FLAME_ISA
