// Gradient of the parameters through a recorded step (flow_record.h): deltas of a tile of rows in
// one launch, then weight gradients.
//
// d_action (rows, A), d_log_prob (rows), d_transport (rows, A, A) or null, record: device memory of
// the caller; gradients (flat buffer) is added to. Workspace: the deltas, about 4 (1 + A) bytes per
// row and hidden unit.
//
// Operations 4 rows (1 + A) (weights) less the deltas of the inputs: 256 rows, A 6, 55 -> 3 x 256
// -> 6, 1.0 GFLOP, floor 15 us at 67 TFLOP/s; the record is read and 6 MB of deltas written and
// read, 7 us at 3.35 TB/s if they left L2. Weight gradients are 40 blocks over 1792 rows: 30 us on
// as many multiprocessors of 132 at their peak.
#pragma once

#include "cuda/flow_step.h"
#include "cuda/training.h"
#include "cuda/weight_gradients.h"
#include "partition.h"

namespace flame::FLAME_ISA {

template <int kRowsPerWarp>
struct FlowBackwardKernel {
    static constexpr const char* kName = "flow_backward";
    MlpView net;
    FlowGradientArgs a;
    FlowRecord record;
    int samples;  // per tile
    TileLds lds;

    FLAME_BODY void operator()(const Block& block) const {
        auto tile = make_tile<kRowsPerWarp>(block, lds);
        const int group = record.tape.group;
        const int n = a.recorded.action_dim;
        const int64_t first = block.index * samples;
        const int count = row_count(first, a.recorded.states, samples);
        const TangentTileTape kept{{&record.tape, 0, first, block.index}};
        load_rows(block, tile, count * group, n, [&](int r, int c) {
            const int64_t b = first + r / group;
            const float delta = r % group == 0 ? a.recorded.scale[0] * a.deltas.d_action[b * n + c]
                                               : tangent_delta(b, r % group - 1, c);
            kept.output_delta(0, n)[r * n + c] = delta;
            return delta;
        });
        tangent_backward_tile(block, tile, net, count, kept);
    }

    // Of output c of tangent t, J[c][t].
    FLAME_BODY float tangent_delta(int64_t b, int t, int c) const {
        const int64_t n = a.recorded.action_dim;
        const float of_density =
            a.deltas.d_log_prob[b] * record.jacobian_gradient[(b * n + t) * n + c];
        if (a.deltas.d_transport == nullptr) return of_density;
        return fmaf(a.recorded.scale[0], a.deltas.d_transport[(b * n + c) * n + t], of_density);
    }
};

struct FlowBackwardMemory {
    TilePlan plan;
    FlowRecord record;  // with the tape's deltas
};

static inline FlowBackwardMemory carve_flow_backward(const Launcher& launch,
                                                     const FlowGradientArgs& a, Carver& memory) {
    Carver recorded(a.record);
    FlowBackwardMemory m{};
    m.record = carve_flow_record(a.recorded, recorded);
    m.plan = plan_tiles(launch, a.recorded.spec, {a.recorded.states, m.record.tape.group});
    carve_deltas(a.recorded.spec, m.plan.tiles, m.record.tape, memory);
    return m;
}

static inline void flow_backward(const Launcher& launch, const FlowGradientArgs& a,
                                 Carver& memory) {
    if (a.recorded.states == 0) return;
    const FlowBackwardMemory m = carve_flow_backward(launch, a, memory);
    with_rows(m.plan, [&](auto rows) {
        const FlowBackwardKernel<decltype(rows)::value> kernel{
            make_view(a.recorded.spec, a.recorded.parameters), a, m.record, m.plan.samples,
            m.plan.lds};
        launch(kernel, m.plan.tiles, m.plan.shared);
    });
    weight_gradients(launch, a.recorded.spec, m.record.tape, a.deltas.gradients);
}

}  // namespace flame::FLAME_ISA
