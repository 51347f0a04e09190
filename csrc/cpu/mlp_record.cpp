// An ensemble's forward pass that can be differentiated later by its parameters and inputs, for
// losses that are computed elsewhere.
#include "cpu/mlp_input.h"
#include "cpu/mlp_tape.h"
#include "cpu/training_kernels.h"

namespace flame::FLAME_ISA {
namespace {

struct RecordedMlp {
    MlpTape head;  // first: MlpTape* points here
    MlpSpec spec;
    PackedMlp packed;
    Tape tapes[kMaxMembers];
    const float* input;  // (rows, ldx)
    ptrdiff_t ldx;
    float* member_input[kMaxMembers];  // (rows, input_ld) each, the inputs' gradients
    ptrdiff_t input_ld;
};

// The members share their input, so its gradient is the sum of theirs.
void sum_input_gradients(const RecordedMlp& mlp, float* d_input) {
    const int columns = mlp.head.input_columns;
    for (int64_t i = 0; i < mlp.head.rows; ++i) {
        float* to = d_input + i * columns;
        std::memcpy(to, mlp.member_input[0] + i * mlp.input_ld, columns * sizeof(float));
        for (int m = 1; m < mlp.spec.members; ++m) {
            const float* from = mlp.member_input[m] + i * mlp.input_ld;
            for (int j = 0; j < columns; ++j) to[j] += from[j];
        }
    }
}

void mlp_backward(const MlpBackwardArgs& args) {
    const RecordedMlp& mlp = *reinterpret_cast<const RecordedMlp*>(args.tape);
    const int out = mlp.spec.sizes[mlp.spec.num_layers];
    for_member_chunks(mlp.tapes, mlp.spec.members, [&](int64_t m, int64_t c) {
        const Tape& tape = mlp.tapes[m];
        const RowRange range = tape.cut[c];
        for (int64_t i = range.first; i < range.first + range.rows; ++i) {
            std::memcpy(tape.output_delta + i * tape.output_ld,
                        args.d_output + (m * tape.cut.rows + i) * out, out * sizeof(float));
        }
        backward_rows(mlp.packed.layers[m], tape, c);
        if (args.d_input) {
            input_gradient_rows(mlp.packed.layers[m], tape, range, mlp.member_input[m],
                                mlp.input_ld);
        }
    });
    if (args.gradients) {
        add_member_gradients(mlp.spec, mlp.tapes, mlp.input, mlp.ldx, args.gradients);
    }
    if (args.d_input) sum_input_gradients(mlp, args.d_input);
}

}  // namespace

MlpTape* mlp_record(const MlpRecordArgs& args, Workspace& memory) {
    const MlpForwardArgs& a = args.forward;
    auto* mlp = static_cast<RecordedMlp*>(memory.bytes(sizeof(RecordedMlp)));
    *mlp = RecordedMlp{};
    mlp->head = {&mlp_backward, a.rows, args.input_columns,
                 static_cast<int64_t>(parameter_count(a.spec))};
    mlp->spec = a.spec;
    pack_mlp(a.spec, a.parameters, {true, args.input_columns}, memory, mlp->packed);
    const int in = a.spec.sizes[0];
    const InputBlock block{a.input, a.input_ld, in};
    mlp->input = concatenate(a.rows, &block, 1, in, memory);
    mlp->ldx = padded_columns(in);
    mlp->input_ld = padded_columns(args.input_columns);
    for (int m = 0; m < a.spec.members; ++m) {
        mlp->tapes[m] = make_tape(a.spec, a.rows, memory);
        mlp->member_input[m] = memory.floats(a.rows * mlp->input_ld);
    }
    const int out = a.spec.sizes[a.spec.num_layers];
    for_member_chunks(mlp->tapes, a.spec.members, [&](int64_t m, int64_t c) {
        const Tape& tape = mlp->tapes[m];
        const RowRange range = tape.cut[c];
        with_activation(a.spec.activation, [&](auto act) {
            record_rows<decltype(act)>(mlp->packed.layers[m], tape, range, mlp->input, mlp->ldx);
        });
        for (int64_t i = range.first; i < range.first + range.rows; ++i) {
            std::memcpy(a.output + (m * a.rows + i) * out, tape.output + i * tape.output_ld,
                        out * sizeof(float));
        }
    });
    return &mlp->head;
}

}  // namespace flame::FLAME_ISA
