// output[m, b, :] = MLP_m(input[b, :]) for every member m of an ensemble.
#include "cpu/training_kernels.h"

#include "cpu/mlp_tile.h"

namespace flame::FLAME_ISA {
namespace {

template <typename Act>
void forward_rows(const MlpForwardArgs& a, const PackedMlp& packed, int64_t first, int rows,
                  const TileBuffers& tile) {
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

}  // namespace

void mlp_forward(const MlpForwardArgs& a) {
    Workspace workspace;
    PackedMlp packed;
    pack_mlp(a.spec, a.parameters, {false, 0}, workspace, packed);
    const int width = widest_row(a.spec);
    const int chunk = even_chunk(a.rows, tile_rows(width));
    const int64_t chunks = chunk > 0 ? (a.rows + chunk - 1) / chunk : 0;
    parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
        Workspace scratch;
        const TileBuffers tile = make_tile_buffers(chunk, width, scratch);
        for (int64_t c = begin; c < end; ++c) {
            const int64_t first = c * chunk;
            const int rows = static_cast<int>(a.rows - first < chunk ? a.rows - first : chunk);
            with_activation(a.spec.activation, [&](auto act) {
                forward_rows<decltype(act)>(a, packed, first, rows, tile);
            });
        }
    });
}

}  // namespace flame::FLAME_ISA
