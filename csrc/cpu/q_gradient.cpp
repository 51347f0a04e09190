// Qmin(s, a) over an ensemble and its gradient with respect to the action.
//
// Every member runs forward; a row runs backward through its smallest member only (the first of
// equals), so that the backward pass costs that of one member.
#include "cpu/mlp_input.h"
#include "cpu/mlp_tape.h"
#include "cpu/training_kernels.h"
#include "scalar_rules.h"

namespace flame::FLAME_ISA {
namespace {

struct MemberTapes {
    Tape tape[kMaxMembers];
    float* gradient;  // (chunk rows, ld)
    ptrdiff_t ld;
};

// Qmin of each row and the member it comes from.
void select_minimum(const QGradientArgs& a, const MemberTapes& tapes, int64_t first, int rows,
                    int* member) {
    for (int i = 0; i < rows; ++i) {
        const ptrdiff_t at = i * tapes.tape[0].output_ld;
        int best = 0;
        for (int m = 1; m < a.spec.members; ++m) {
            if (takes_minimum(tapes.tape[m].output[at], tapes.tape[best].output[at])) best = m;
        }
        a.q_min[first + i] = tapes.tape[best].output[at];
        member[i] = best;
    }
}

// Moves what the backward pass reads of row `from` to row `to`.
void move_row(const Tape& tape, int from, int to) {
    if (from == to) return;
    for (int l = 0; l + 1 < tape.num_layers; ++l) {
        const TapeLayer& layer = tape.hidden[l];
        const size_t bytes = layer.ld * sizeof(float);
        std::memcpy(layer.slope + to * layer.ld, layer.slope + from * layer.ld, bytes);
        if (!layer.normed) continue;
        std::memcpy(layer.normed + to * layer.ld, layer.normed + from * layer.ld, bytes);
        layer.inverse_std[to] = layer.inverse_std[from];
    }
}

// Gradient of member m at the rows that chose it, as its tape's first rows; writes them to `to`.
void member_gradient(const PackedLayer* layers, const MemberTapes& tapes, int m, const int* member,
                     int rows, int action_dim, float* to) {
    const Tape& tape = tapes.tape[m];
    int chosen[kTapeRows];
    int count = 0;
    for (int i = 0; i < rows; ++i) {
        if (member[i] != m) continue;
        move_row(tape, i, count);
        tape.output_delta[count * tape.output_ld] = 1.0f;
        chosen[count++] = i;
    }
    const RowRange range{0, count};
    backward_range(layers, tape, range, 0);
    input_gradient_rows(layers, tape, range, tapes.gradient, tapes.ld);
    for (int j = 0; j < count; ++j) {
        std::memcpy(to + chosen[j] * action_dim, tapes.gradient + j * tapes.ld,
                    action_dim * sizeof(float));
    }
}

template <typename Act>
void q_gradient_rows(const QGradientArgs& a, const PackedMlp& packed, const MemberTapes& tapes,
                     const float* input, ptrdiff_t ldx, const RowRange& range) {
    const auto [first, rows] = range;
    for (int m = 0; m < a.spec.members; ++m) {
        record_rows<Act>(packed.layers[m], tapes.tape[m], {0, rows}, input + first * ldx, ldx);
    }
    int member[kTapeRows];
    select_minimum(a, tapes, first, rows, member);
    for (int m = 0; m < a.spec.members; ++m) {
        member_gradient(packed.layers[m], tapes, m, member, rows, a.action_dim,
                        a.gradient + first * a.action_dim);
    }
}

}  // namespace

void q_gradient(const QGradientArgs& a) {
    Workspace workspace;
    PackedMlp packed;
    pack_mlp(a.spec, a.parameters, {true, a.action_dim}, workspace, packed);
    const int in = a.spec.sizes[0];
    const InputBlock blocks[2] = {{a.action, a.action_ld, a.action_dim},
                                  {a.obs, a.obs_ld, in - a.action_dim}};
    const float* input = concatenate(a.rows, blocks, 2, in, workspace);
    const ptrdiff_t ldx = padded_columns(in);
    const RowCut cut = balanced_cut(a.rows, kTapeRows);
    parallel_for(cut.chunks, 1, [&](int64_t begin, int64_t end) {
        Workspace scratch;
        MemberTapes tapes;
        for (int m = 0; m < a.spec.members; ++m) {
            tapes.tape[m] = make_tape(a.spec, cut.most(), scratch);
        }
        tapes.ld = padded_columns(a.action_dim);
        tapes.gradient = scratch.floats(cut.most() * tapes.ld);
        for (int64_t c = begin; c < end; ++c) {
            const RowRange range = cut[c];
            with_activation(a.spec.activation, [&](auto act) {
                q_gradient_rows<decltype(act)>(a, packed, tapes, input, ldx, range);
            });
        }
    });
}

}  // namespace flame::FLAME_ISA
