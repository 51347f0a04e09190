// output[m, b, :] = MLP_m(input[b, :]) for every member m of an ensemble.
#include "cpu/training_kernels.h"

#include "cpu/mlp_tile.h"

namespace flame::FLAME_ISA {
namespace {

template <typename Act>
void forward_rows(const MlpForwardArgs& a, const PackedMlp& packed, const RowRange& range,
                  const TileBuffers& tile) {
    const auto [first, rows] = range;
    const int out = a.spec.sizes[a.spec.num_layers];
    for (int m = 0; m < packed.members; ++m) {
        const PackedLayer* layers = packed.layers[m];
        fill_rows(tile.init, rows, layers[0].bias, 0);
        gemm_packed(rows, layers[0].out, 0, layers[0].in, layers[0].in,
                    a.input + first * a.input_ld, a.input_ld, layers[0].forward, tile.init, tile.x,
                    tile.ld);
        const float* y = finish_tile<Act>(layers, packed.num_layers, false, rows, tile);
        for (int i = 0; i < rows; ++i) {
            float* to = a.output + (m * a.rows + first + i) * out;
            std::memcpy(to, y + i * tile.ld, out * sizeof(float));
        }
    }
}

// Fewer rows than this are read against the weights as they lie: packing costs about six of them.
constexpr int64_t kFewRows = 6;

// One row through one member; `x` and `y` hold the widest layer.
template <typename Act>
void forward_row(const MlpForwardArgs& a, int m, const float* input, float* x, float* y,
                 float* output) {
    const int layers = a.spec.num_layers;
    std::memcpy(x, input, a.spec.sizes[0] * sizeof(float));
    for (int l = 0; l < layers; ++l) {
        const LayerOffsets at = layer_offsets(a.spec, l);
        const int in = a.spec.sizes[l];
        const int out = a.spec.sizes[l + 1];
        const size_t row = static_cast<size_t>(m) * out;
        const float* weight = a.parameters + at.weight + row * in;
        const float* bias = a.parameters + at.bias + row;
        for (int o = 0; o < out; ++o) {
            y[o] = dot(weight + static_cast<size_t>(o) * in, x, in) + bias[o];
        }
        if (l + 1 == layers) break;
        const bool norm = has_norm(a.spec, l);
        const PackedLayer layer{in,
                                out,
                                nullptr,
                                nullptr,
                                0,
                                bias,
                                norm ? a.parameters + at.gain + row : nullptr,
                                norm ? a.parameters + at.offset + row : nullptr};
        activate_rows<Act>(layer, 1, y, 0);
        float* swap = x;
        x = y;
        y = swap;
    }
    std::memcpy(output, y, a.spec.sizes[layers] * sizeof(float));
}

void forward_few(const MlpForwardArgs& a) {
    Workspace workspace;
    const int input = padded_columns(a.spec.sizes[0]);
    const int width = widest_row(a.spec) > input ? widest_row(a.spec) : input;
    float* x = workspace.floats(width);
    float* y = workspace.floats(width);
    const int out = a.spec.sizes[a.spec.num_layers];
    for (int m = 0; m < a.spec.members; ++m) {
        for (int64_t i = 0; i < a.rows; ++i) {
            with_activation(a.spec.activation, [&](auto act) {
                forward_row<decltype(act)>(a, m, a.input + i * a.input_ld, x, y,
                                           a.output + (m * a.rows + i) * out);
            });
        }
    }
}

}  // namespace

void mlp_forward(const MlpForwardArgs& a) {
    if (a.rows < kFewRows) return forward_few(a);
    Workspace workspace;
    PackedMlp packed;
    pack_mlp(a.spec, a.parameters, {false, 0}, workspace, packed);
    const int width = widest_row(a.spec);
    const RowCut cut = balanced_cut(a.rows, tile_rows(width));
    parallel_for(cut.chunks, 1, [&](int64_t begin, int64_t end) {
        Workspace scratch;
        const TileBuffers tile = make_tile_buffers(cut.most(), width, scratch);
        for (int64_t c = begin; c < end; ++c) {
            with_activation(a.spec.activation, [&](auto act) {
                forward_rows<decltype(act)>(a, packed, cut[c], tile);
            });
        }
    });
}

}  // namespace flame::FLAME_ISA
