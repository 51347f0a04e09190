// Qmin(s, a) over an ensemble and its gradient with respect to the action.
//
// Every member runs forward; the backward pass of a row carries a one into the smallest member only
// (the first of equals).
#include "cpu/mlp_input.h"
#include "cpu/mlp_tape.h"
#include "cpu/training_kernels.h"

namespace flame::FLAME_ISA {
namespace {

struct MemberTapes {
    Tape tape[kMaxMembers];
    float* gradient;  // (chunk rows, ld)
    ptrdiff_t ld;
};

// Marks the smallest member of each row in the tapes' output deltas.
void select_minimum(const QGradientArgs& a, const MemberTapes& tapes, int64_t first, int rows) {
    for (int i = 0; i < rows; ++i) {
        const ptrdiff_t at = i * tapes.tape[0].output_ld;
        int best = 0;
        for (int m = 1; m < a.spec.members; ++m) {
            const float q = tapes.tape[m].output[at];
            if (q < tapes.tape[best].output[at] || q != q) best = m;
        }
        a.q_min[first + i] = tapes.tape[best].output[at];
        for (int m = 0; m < a.spec.members; ++m) {
            tapes.tape[m].output_delta[at] = m == best ? 1.0f : 0.0f;
        }
    }
}

template <typename Act>
void q_gradient_rows(const QGradientArgs& a, const PackedMlp& packed, const MemberTapes& tapes,
                     const float* input, ptrdiff_t ldx, int64_t first, int rows) {
    const ChunkRange range{0, rows};
    for (int m = 0; m < a.spec.members; ++m) {
        record_rows<Act>(packed.layers[m], tapes.tape[m], range, input + first * ldx, ldx);
    }
    select_minimum(a, tapes, first, rows);
    float* to = a.gradient + first * a.action_dim;
    __builtin_memset(to, 0, static_cast<size_t>(rows) * a.action_dim * sizeof(float));
    for (int m = 0; m < a.spec.members; ++m) {
        backward_range(packed.layers[m], tapes.tape[m], range, 0);
        input_gradient_rows(packed.layers[m], tapes.tape[m], range, tapes.gradient, tapes.ld);
        for (int i = 0; i < rows; ++i) {
            for (int j = 0; j < a.action_dim; ++j) {
                to[i * a.action_dim + j] += tapes.gradient[i * tapes.ld + j];
            }
        }
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
    const int chunk = even_chunk(a.rows, kTapeRows);
    parallel_for((a.rows + chunk - 1) / chunk, 1, [&](int64_t begin, int64_t end) {
        Workspace scratch;
        MemberTapes tapes;
        for (int m = 0; m < a.spec.members; ++m) tapes.tape[m] = make_tape(a.spec, chunk, scratch);
        tapes.ld = padded_columns(a.action_dim);
        tapes.gradient = scratch.floats(chunk * tapes.ld);
        for (int64_t c = begin; c < end; ++c) {
            const int64_t first = c * chunk;
            const int rows = row_count(first, a.rows, chunk);
            with_activation(a.spec.activation, [&](auto act) {
                q_gradient_rows<decltype(act)>(a, packed, tapes, input, ldx, first, rows);
            });
        }
    });
}

}  // namespace flame::FLAME_ISA
