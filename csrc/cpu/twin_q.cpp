// Q_m(s, a_k) of K candidate actions per state and their minimum over the ensemble.
//
// Operations per member: 2 B K (A h + (L - 2) h^2 + h) + 2 B O h, with L - 1 hidden layers of width
// h; bytes: the candidates and the outputs, since activations stay in L2. Bound by the FMA units.
#include "cpu/training_kernels.h"

#include "cpu/twin_q_tile.h"

namespace flame::FLAME_ISA {
namespace {

template <typename Act>
void twin_q_rows(const TwinQArgs& a, const CandidateNetwork& critics, const RowRange& range,
                 const TileBuffers& tile) {
    const auto [first, rows] = range;
    const int64_t total = a.states * a.candidates;
    const CandidateRows candidates{first, a.candidates, rows, a.actions + first * a.action_dim,
                                   a.action_dim};
    float q[kMaxTileRows];
    for (int m = 0; m < critics.packed->members; ++m) {
        candidate_q_tile<Act>(critics, m, candidates, tile, q);
        take_minimum(m == 0, rows, q, a.q_min + first);
        if (a.q_each) std::memcpy(a.q_each + m * total + first, q, rows * sizeof(float));
    }
}

}  // namespace

void twin_q(const TwinQArgs& a) {
    Workspace workspace;
    PackedMlp packed;
    pack_mlp(a.spec, a.parameters, {false, 0}, workspace, packed);
    const CandidateNetwork critics =
        prepare_candidates(a.spec, packed, a.action_dim, a.states, a.obs, a.obs_ld, workspace);
    const int64_t total = a.states * a.candidates;
    const RowCut cut = balanced_cut(total, tile_rows(critics.width));
    parallel_for(cut.chunks, 1, [&](int64_t begin, int64_t end) {
        Workspace scratch;
        const TileBuffers tile = make_tile_buffers(cut.most(), critics.width, scratch);
        for (int64_t c = begin; c < end; ++c) {
            with_activation(a.spec.activation, [&](auto act) {
                twin_q_rows<decltype(act)>(a, critics, cut[c], tile);
            });
        }
    });
}

}  // namespace flame::FLAME_ISA
