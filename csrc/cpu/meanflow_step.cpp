// The MeanFlow loss and its gradient (Geng et al. 2025, Eqs. 9-11): per chunk of rows the value,
// one tangent and the backward pass while the rows are in cache, then the weight gradients.
//
// The tangent is under a stop-gradient, so it runs forward only and reuses the value's activation
// derivatives: about 8/6 of a plain regression step's operations.
#include "cpu/mlp_input.h"
#include "cpu/mlp_tangent.h"
#include "cpu/training_kernels.h"

namespace flame::FLAME_ISA {
namespace {

struct Inputs {
    const float* rows;  // (B, ldx): z, observation, time features
    ptrdiff_t ldx;
    const float* time_tangent;  // (B, kTimeFeatures)
};

Inputs make_inputs(const MeanFlowStepArgs& a, Workspace& workspace) {
    float* feature = workspace.floats(a.rows * kTimeFeatures);
    float* tangent = workspace.floats(a.rows * kTimeFeatures);
    for (int64_t i = 0; i < a.rows; ++i) {
        for (int c = 0; c < kTimeFeatures; ++c) {
            const TimeFeature f = time_feature(c, a.t[i], a.r[i]);
            feature[i * kTimeFeatures + c] = f.value;
            tangent[i * kTimeFeatures + c] = f.derivative;
        }
    }
    const int in = a.spec.sizes[0];
    const InputBlock blocks[3] = {{a.z, a.action_dim, a.action_dim},
                                  {a.obs, a.obs_ld, in - a.action_dim - kTimeFeatures},
                                  {feature, kTimeFeatures, kTimeFeatures}};
    return {concatenate(a.rows, blocks, 3, in, workspace), padded_columns(in), tangent};
}

// Linear tangents of the first layer: W_z v + W_time d(features)/dt.
void first_tangent(const MeanFlowStepArgs& a, const PackedLayer& layer, const Inputs& inputs,
                   const RowRange& range, float* x, ptrdiff_t ld) {
    const float* init[kTapeRows];
    gemm_packed(range.rows, layer.out, 0, a.action_dim, layer.in,
                a.velocity + range.first * a.action_dim, a.action_dim, layer.forward, nullptr, x,
                ld);
    fill_rows(init, range.rows, x, ld);
    gemm_packed(range.rows, layer.out, layer.in - kTimeFeatures, kTimeFeatures, layer.in,
                inputs.time_tangent + range.first * kTimeFeatures, kTimeFeatures, layer.forward,
                init, x, ld);
}

// Tangents of the outputs of a recorded chunk; returns the buffer that holds them.
float* carry_tangent(const PackedLayer* layers, const Tape& tape, const RowRange& range, float* x,
                     float* y, ptrdiff_t ld) {
    for (int l = 0; l + 1 < tape.num_layers; ++l) {
        const TapeLayer& layer = tape.hidden[l];
        for (int i = 0; i < range.rows; ++i) {
            const ptrdiff_t at = (range.first + i) * layer.ld;
            float* row = x + i * ld;
            if (layers[l].gain) {
                normalise_tangent(row, layer.normed + at, layers[l].out,
                                  layer.inverse_std[range.first + i]);
            }
            for (int c = 0; c < layers[l].out; c += kLanes) {
                const vf slope = load(layer.slope + at + c);
                const vf d = layers[l].gain ? slope * load(layers[l].gain + c) : slope;
                store(row + c, d * load(row + c));
            }
        }
        const PackedLayer& next = layers[l + 1];
        gemm_packed(range.rows, next.out, 0, next.in, next.in, x, ld, next.forward, nullptr, y, ld);
        float* swap = x;
        x = y;
        y = swap;
    }
    return x;
}

// Output deltas 2 / B (u - target) of a chunk; returns its sum of squared errors.
double output_deltas(const MeanFlowStepArgs& a, const Tape& tape, const RowRange& range,
                     const float* tangent, ptrdiff_t ld) {
    const float scale = 2.0f / static_cast<float>(a.rows);
    double total = 0.0;
    for (int i = 0; i < range.rows; ++i) {
        const int64_t b = range.first + i;
        const float span = a.t[b] - a.r[b];
        for (int j = 0; j < a.action_dim; ++j) {
            const float target = a.velocity[b * a.action_dim + j] - span * tangent[i * ld + j];
            const float error = tape.output[b * tape.output_ld + j] - target;
            tape.output_delta[b * tape.output_ld + j] = scale * error;
            total += static_cast<double>(error) * static_cast<double>(error);
        }
    }
    return total;
}

}  // namespace

void meanflow_step(const MeanFlowStepArgs& a) {
    Workspace workspace;
    PackedMlp packed;
    pack_mlp(a.spec, a.parameters, {true, 0}, workspace, packed);
    const PackedLayer* layers = packed.layers[0];
    const Inputs inputs = make_inputs(a, workspace);
    const Tape tape = make_tape(a.spec, a.rows, workspace);
    const int width = widest_row(a.spec);
    double* errors = static_cast<double*>(workspace.bytes(tape.cut.chunks * sizeof(double)));
    parallel_for(tape.cut.chunks, 1, [&](int64_t begin, int64_t end) {
        Workspace scratch;
        float* x = scratch.floats(static_cast<size_t>(tape.cut.most()) * width);
        float* y = scratch.floats(static_cast<size_t>(tape.cut.most()) * width);
        for (int64_t c = begin; c < end; ++c) {
            const RowRange range = tape.cut[c];
            with_activation(a.spec.activation, [&](auto act) {
                record_rows<decltype(act)>(layers, tape, range, inputs.rows, inputs.ldx);
            });
            first_tangent(a, layers[0], inputs, range, x, width);
            const float* tangent = carry_tangent(layers, tape, range, x, y, width);
            errors[c] = output_deltas(a, tape, range, tangent, width);
            backward_rows(layers, tape, c);
        }
    });
    LayerGradient list[kMaxLayers];
    run_layer_gradients(list, append_layer_gradients(a.spec, tape, 0, inputs.rows, inputs.ldx,
                                                     a.gradients, list, 0));
    double total = 0.0;
    for (int64_t c = 0; c < tape.cut.chunks; ++c) total += errors[c];
    *a.loss = total / static_cast<double>(a.rows);
}

}  // namespace flame::FLAME_ISA
