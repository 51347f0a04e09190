// Samples of a flow policy with their log-density, forward only (any number of steps and samples
// per state) or recorded for a gradient (one step).
//
// Change of variables: log pi(a) = log N(eps) - log|det(I + q J)| for a = eps + q u(eps), J =
// du/deps from A forward tangents whose first layer is simply the action columns of its weight. The
// other estimators replace the log-determinant by q tr J or q probe' J probe per step.
#include "cpu/mlp_input.h"
#include "cpu/mlp_tangent.h"
#include "cpu/training_kernels.h"
#include "partition.h"
#include "scalar_rules.h"
#include "small_lu.h"

namespace flame::FLAME_ISA {
namespace {

float standard_normal_log_prob(const float* noise, int n) {
    double squares = 0.0;
    for (int j = 0; j < n; ++j) squares += static_cast<double>(noise[j]) * noise[j];
    return static_cast<float>(-0.5 * squares - n * kHalfLog2Pi);
}

int tangent_count(Divergence divergence, int action_dim) {
    if (divergence == Divergence::kNone) return 0;
    return divergence == Divergence::kProbe ? 1 : action_dim;
}

// Row j of the result (A, ld) is column j of the first layer's weight.
const float* action_columns(const PackedLayer& layer, int action_dim, Workspace& workspace) {
    const int ld = padded_columns(layer.out);
    float* rows = workspace.floats(static_cast<size_t>(action_dim) * ld);
    for (int j = 0; j < action_dim; ++j) {
        for (int c = 0; c < panel_count(layer.out) * kGemmCols; ++c) {
            rows[j * ld + c] = packed_value(layer.forward, layer.in, j, c);
        }
    }
    return rows;
}

FLAME_INLINE float* first_rows(const TangentTape& tape) {
    return tape.num_layers > 1 ? tape.hidden[0].h : tape.output;
}

FLAME_INLINE ptrdiff_t first_rows_ld(const TangentTape& tape) {
    return tape.num_layers > 1 ? tape.hidden[0].ld : tape.output_ld;
}

void set_basis_tangents(const float* columns, int columns_ld, const TangentTape& tape, int64_t at,
                        int samples) {
    const ptrdiff_t ld = first_rows_ld(tape);
    const int group = 1 + tape.tangents;
    for (int64_t i = at; i < at + samples; ++i) {
        for (int t = 0; t < tape.tangents; ++t) {
            std::memcpy(first_rows(tape) + (i * group + 1 + t) * ld, columns + t * columns_ld,
                        columns_ld * sizeof(float));
        }
    }
}

// m = I + q J of the sample at position i of the tape; J[a][j] is output a of tangent j.
void flow_jacobian(const TangentTape& tape, int64_t i, int n, double q, double* m) {
    const float* rows = tape.output + (i * (1 + n) + 1) * tape.output_ld;
    for (int j = 0; j < n; ++j) {
        for (int a = 0; a < n; ++a) {
            m[a * n + j] =
                (a == j ? 1.0 : 0.0) + q * static_cast<double>(rows[j * tape.output_ld + a]);
        }
    }
}

double trace(const TangentTape& tape, int64_t i, int n) {
    const float* rows = tape.output + (i * (1 + n) + 1) * tape.output_ld;
    double total = 0.0;
    for (int j = 0; j < n; ++j) total += static_cast<double>(rows[j * tape.output_ld + j]);
    return total;
}

double probe_trace(const TangentTape& tape, int64_t i, int n, const float* probe) {
    const float* row = tape.output + (i * 2 + 1) * tape.output_ld;
    double total = 0.0;
    for (int j = 0; j < n; ++j) total += static_cast<double>(probe[j]) * row[j];
    return total;
}

// One sampler step: what all chunks share.
struct Step {
    int index;
    const float* part;  // (states, ld): first layer without its action columns
    ptrdiff_t part_ld;
    const float* columns;
};

// W_s s + b of every state, which all steps share.
void state_parts(const FlowDensityArgs& a, const PackedLayer& layer, float* part, ptrdiff_t ld) {
    const int obs_dim = layer.in - a.action_dim - a.time_features;
    parallel_for(divide_up(a.states, kMaxTileRows), 1, [&](int64_t begin, int64_t end) {
        const float* init[kMaxTileRows];
        for (int64_t c = begin; c < end; ++c) {
            const int64_t first = c * kMaxTileRows;
            const int rows = row_count(first, a.states, kMaxTileRows);
            fill_rows(init, rows, layer.bias, 0);
            gemm_packed(rows, layer.out, a.action_dim, obs_dim, layer.in, a.obs + first * a.obs_ld,
                        a.obs_ld, layer.forward, init, part + first * ld, ld);
        }
    });
}

// With the step's W_time f.
void add_time(const FlowDensityArgs& a, const PackedLayer& layer, int step, const float* states,
              float* part, ptrdiff_t ld) {
    Workspace workspace;
    float* time = workspace.floats(ld);
    gemm_packed(1, layer.out, layer.in - a.time_features, a.time_features, layer.in,
                a.time + static_cast<ptrdiff_t>(step) * a.time_features, a.time_features,
                layer.forward, nullptr, time, ld);
    parallel_for(a.states, kMaxTileRows, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            for (int c = 0; c < layer.out; c += kLanes) {
                store(part + i * ld + c, load(states + i * ld + c) + load(time + c));
            }
        }
    });
}

// First-layer linear outputs and tangents of a chunk at position 0 of a scratch tape.
void first_layer(const FlowDensityArgs& a, const PackedLayer& layer, const TangentTape& tape,
                 const Step& step, const RowRange& range) {
    const float* init[kMaxTileRows];
    const ptrdiff_t ld = first_rows_ld(tape);
    const int group = 1 + tape.tangents;
    for (int i = 0; i < range.rows; ++i) {
        init[i] = step.part + (range.first + i) / a.samples * step.part_ld;
    }
    gemm_packed(range.rows, layer.out, 0, a.action_dim, layer.in,
                a.action + range.first * a.action_dim, a.action_dim, layer.forward, init,
                first_rows(tape), group * ld);
    if (a.divergence == Divergence::kProbe) {
        gemm_packed(range.rows, layer.out, 0, a.action_dim, layer.in,
                    a.probe + range.first * a.action_dim, a.action_dim, layer.forward, nullptr,
                    first_rows(tape) + ld, group * ld);
    } else if (tape.tangents > 0) {
        set_basis_tangents(step.columns, padded_columns(layer.out), tape, 0, range.rows);
    }
}

// z <- z + q u and the step's share of the log-density.
void advance(const FlowDensityArgs& a, const TangentTape& tape, int step, const RowRange& range) {
    const int n = a.action_dim;
    const double q = static_cast<double>(a.scale[step]);
    double m[kMaxActions * kMaxActions];
    int pivot[kMaxActions];
    for (int i = 0; i < range.rows; ++i) {
        const int64_t b = range.first + i;
        const float* u = tape.output + i * (1 + tape.tangents) * tape.output_ld;
        for (int j = 0; j < n; ++j) a.action[b * n + j] += a.scale[step] * u[j];
        if (a.divergence == Divergence::kLogDet) {
            flow_jacobian(tape, i, n, q, m);
            const LogDet det = lu_factor(m, n, pivot);
            a.log_prob[b] -= static_cast<float>(det.log_abs);
            a.folded[b] = a.folded[b] != det.negative;
        } else if (a.divergence == Divergence::kTrace) {
            a.log_prob[b] -= static_cast<float>(q * trace(tape, i, n));
        } else if (a.divergence == Divergence::kProbe) {
            a.log_prob[b] -= static_cast<float>(q * probe_trace(tape, i, n, a.probe + b * n));
        }
    }
}

void start(const FlowDensityArgs& a) {
    const int64_t rows = a.states * a.samples;
    std::memcpy(a.action, a.noise, static_cast<size_t>(rows) * a.action_dim * sizeof(float));
    for (int64_t b = 0; b < rows; ++b) {
        a.log_prob[b] = standard_normal_log_prob(a.noise + b * a.action_dim, a.action_dim);
        a.folded[b] = false;
    }
}

}  // namespace

void flow_density(const FlowDensityArgs& a) {
    Workspace workspace;
    PackedMlp packed;
    pack_mlp(a.spec, a.parameters, {false, 0}, workspace, packed);
    const PackedLayer* layers = packed.layers[0];
    const int tangents = tangent_count(a.divergence, a.action_dim);
    const ptrdiff_t ld = padded_columns(layers[0].out);
    float* states = workspace.floats(static_cast<size_t>(a.states) * ld);
    state_parts(a, layers[0], states, ld);
    float* part = workspace.floats(static_cast<size_t>(a.states) * ld);
    const float* columns = action_columns(layers[0], a.action_dim, workspace);
    const int64_t rows = a.states * a.samples;
    start(a);
    for (int s = 0; s < a.steps; ++s) {
        add_time(a, layers[0], s, states, part, ld);
        const Step step{s, part, ld, columns};
        const int chunk = tangent_chunk(rows, tangents);
        parallel_for(divide_up(rows, chunk), 1, [&](int64_t begin, int64_t end) {
            Workspace scratch;
            const TangentTape tape = make_tangent_tape(a.spec, rows, tangents, false, scratch);
            for (int64_t c = begin; c < end; ++c) {
                const RowRange range = tangent_range(tape, c);
                first_layer(a, layers[0], tape, step, range);
                with_activation(a.spec.activation, [&](auto act) {
                    tangent_forward<decltype(act), false>(layers, tape, 0, range.rows);
                });
                advance(a, tape, s, range);
            }
        });
    }
}

// --- Recorded

namespace {

struct RecordedFlow {
    FlowTape head;
    MlpSpec spec;
    PackedMlp packed;
    TangentTape tape;
    const float* input;
    ptrdiff_t ldx;
    float scale;
    float* jacobian_gradient;  // (rows, A, A): d log pi / d J[a][j] at [j][a]
};

// Density of one recorded sample; with M = I + q J, d log pi / dJ[a][j] = -q inverse(M)[j][a].
void record_density(const FlowDensityArgs& a, const RecordedFlow& flow, int64_t b) {
    const int n = a.action_dim;
    double m[kMaxActions * kMaxActions];
    double inverse[kMaxActions * kMaxActions];
    int pivot[kMaxActions];
    const double q = static_cast<double>(flow.scale);
    flow_jacobian(flow.tape, b, n, q, m);
    for (int i = 0; i < n * n; ++i) a.transport[b * n * n + i] = static_cast<float>(m[i]);
    const LogDet det = lu_factor(m, n, pivot);
    a.log_prob[b] -= static_cast<float>(det.log_abs);
    a.folded[b] = det.negative;
    lu_inverse(m, pivot, n, inverse);
    float* to = flow.jacobian_gradient + b * n * n;
    for (int i = 0; i < n * n; ++i) to[i] = static_cast<float>(-q * inverse[i]);
}

void record_chunk(const FlowDensityArgs& a, const RecordedFlow& flow, const float* columns,
                  int64_t c) {
    const float* init[kMaxTileRows];
    const PackedLayer* layers = flow.packed.layers[0];
    const TangentTape& tape = flow.tape;
    const RowRange range = tangent_range(tape, c);
    const int group = 1 + tape.tangents;
    const ptrdiff_t ld = first_rows_ld(tape);
    fill_rows(init, range.rows, layers[0].bias, 0);
    gemm_packed(range.rows, layers[0].out, 0, layers[0].in, layers[0].in,
                flow.input + range.first * flow.ldx, flow.ldx, layers[0].forward, init,
                first_rows(tape) + range.first * group * ld, group * ld);
    set_basis_tangents(columns, padded_columns(layers[0].out), tape, range.first, range.rows);
    with_activation(a.spec.activation, [&](auto act) {
        tangent_forward<decltype(act), true>(layers, tape, range.first, range.rows);
    });
    for (int64_t b = range.first; b < range.first + range.rows; ++b) {
        const float* u = tape.output + b * group * tape.output_ld;
        for (int j = 0; j < a.action_dim; ++j) a.action[b * a.action_dim + j] += flow.scale * u[j];
        record_density(a, flow, b);
    }
}

// Output deltas: u receives q d_action, J receives d_log_prob times its stored gradient and
// q d_transport.
void flow_output_deltas(const RecordedFlow& flow, const FlowBackwardArgs& args, int64_t b) {
    const TangentTape& tape = flow.tape;
    const int n = flow.head.action_dim;
    float* delta = tape.output_delta + b * (1 + tape.tangents) * tape.output_ld;
    for (int j = 0; j < n; ++j) delta[j] = flow.scale * args.d_action[b * n + j];
    for (int t = 0; t < tape.tangents; ++t) {
        const float* gradient = flow.jacobian_gradient + (b * n + t) * n;
        float* to = delta + (1 + t) * tape.output_ld;
        for (int j = 0; j < n; ++j) to[j] = args.d_log_prob[b] * gradient[j];
        if (args.d_transport == nullptr) continue;
        const float* d_transport = args.d_transport + b * n * n + t;  // column t of M
        for (int j = 0; j < n; ++j) to[j] += flow.scale * d_transport[j * n];
    }
}

void flow_backward(const FlowBackwardArgs& args) {
    const RecordedFlow& flow = *reinterpret_cast<const RecordedFlow*>(args.tape);
    parallel_for(flow.tape.chunks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
            const RowRange range = tangent_range(flow.tape, c);
            for (int i = 0; i < range.rows; ++i) flow_output_deltas(flow, args, range.first + i);
            tangent_backward(flow.packed.layers[0], flow.tape, c);
        }
    });
    LayerGradient list[kMaxLayers];
    run_layer_gradients(list, append_tangent_gradients(flow.spec, flow.tape, flow.input, flow.ldx,
                                                       args.gradients, list));
}

// [noise | observation | time features of the one step] of every row.
const float* recorded_input(const FlowDensityArgs& a, Workspace& memory) {
    const int in = a.spec.sizes[0];
    const InputBlock blocks[3] = {{a.noise, a.action_dim, a.action_dim},
                                  {a.obs, a.obs_ld, in - a.action_dim - a.time_features},
                                  {a.time, 0, a.time_features}};
    return concatenate(a.states, blocks, 3, in, memory);
}

}  // namespace

FlowTape* flow_record(const FlowDensityArgs& a, Workspace& memory) {
    auto* flow = static_cast<RecordedFlow*>(memory.bytes(sizeof(RecordedFlow)));
    *flow = RecordedFlow{};
    flow->head = {&flow_backward, a.states, a.action_dim,
                  static_cast<int64_t>(parameter_count(a.spec))};
    flow->spec = a.spec;
    pack_mlp(a.spec, a.parameters, {true, 0}, memory, flow->packed);
    flow->tape = make_tangent_tape(a.spec, a.states, a.action_dim, true, memory);
    flow->input = recorded_input(a, memory);
    flow->ldx = padded_columns(a.spec.sizes[0]);
    flow->scale = a.scale[0];
    flow->jacobian_gradient =
        memory.floats(static_cast<size_t>(a.states) * a.action_dim * a.action_dim);
    Workspace scratch;
    const float* columns = action_columns(flow->packed.layers[0][0], a.action_dim, scratch);
    start(a);
    parallel_for(flow->tape.chunks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) record_chunk(a, *flow, columns, c);
    });
    return &flow->head;
}

}  // namespace flame::FLAME_ISA
