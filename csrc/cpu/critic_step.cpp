// Loss and gradient of an ensemble of critics for fixed targets:
// sum over members m of mean_b (Q_m(s_b, a_b) - y_b)^2.
//
// Operations: about 6 B (weights of one member) per member; gradients are written once.
#include "cpu/mlp_input.h"
#include "cpu/mlp_tape.h"
#include "cpu/training_kernels.h"

namespace flame::FLAME_ISA {
namespace {

// Forward, output delta and backward of one chunk; q is kept in the tape's output.
template <typename Act>
void critic_chunk(const CriticStepArgs& a, const PackedLayer* layers, const Tape& tape, int64_t c,
                  const float* input, ptrdiff_t ldx) {
    const RowRange range = tape.cut[c];
    record_rows<Act>(layers, tape, range, input, ldx);
    const float scale = 2.0f / static_cast<float>(a.rows);
    for (int64_t i = range.first; i < range.first + range.rows; ++i) {
        const float error = tape.output[i * tape.output_ld] - a.target[i];
        tape.output_delta[i * tape.output_ld] = scale * error;
    }
    backward_rows(layers, tape, c);
}

void summarise(const CriticStepArgs& a, const Tape* tapes) {
    for (int m = 0; m < a.spec.members; ++m) {
        double loss = 0.0;
        double mean = 0.0;
        for (int64_t i = 0; i < a.rows; ++i) {
            const float q = tapes[m].output[i * tapes[m].output_ld];
            const double error = static_cast<double>(q) - static_cast<double>(a.target[i]);
            loss += error * error;
            mean += static_cast<double>(q);
            if (a.q) a.q[m * a.rows + i] = q;
        }
        a.loss[m] = loss / static_cast<double>(a.rows);
        a.q_mean[m] = mean / static_cast<double>(a.rows);
    }
}

}  // namespace

void critic_step(const CriticStepArgs& a) {
    Workspace workspace;
    PackedMlp packed;
    pack_mlp(a.spec, a.parameters, {true, 0}, workspace, packed);
    const int in = a.spec.sizes[0];
    const InputBlock blocks[2] = {{a.action, a.action_ld, a.action_dim},
                                  {a.obs, a.obs_ld, in - a.action_dim}};
    const float* input = concatenate(a.rows, blocks, 2, in, workspace);
    const ptrdiff_t ldx = padded_columns(in);
    Tape tapes[kMaxMembers];
    for (int m = 0; m < a.spec.members; ++m) tapes[m] = make_tape(a.spec, a.rows, workspace);
    for_member_chunks(tapes, a.spec.members, [&](int64_t m, int64_t c) {
        with_activation(a.spec.activation, [&](auto act) {
            critic_chunk<decltype(act)>(a, packed.layers[m], tapes[m], c, input, ldx);
        });
    });
    add_member_gradients(a.spec, tapes, input, ldx, a.gradients);
    summarise(a, tapes);
}

}  // namespace flame::FLAME_ISA
