// Actions as critics with embeddings take them: [action | g(action, zs)], where zs are the last
// columns of their observation (flame_ext/embeddings.py).
//
// Three launches: the encoder's inputs, its forward pass, the rows that critics read. Workspace:
// two rows of A + Z and one of Z floats per action.
#pragma once

#include "cpu/training.h"
#include "cuda/elements.h"

namespace flame::FLAME_ISA {

// Rows of actions, what critics take of them and, with an encoder, what is written on the way.
struct SeenPairs {
    Pairs pairs;
    SeenActions seen;
    float* rows;      // (rows, A + Z), `seen`
    float* input;     // (rows, A + Z) [action | zs]
    float* features;  // (rows, Z)
};

static inline SeenPairs carve_seen_pairs(const PairEncoder* encoder, const Pairs& pairs,
                                         Carver& memory) {
    SeenPairs p{
        pairs, {pairs.action, pairs.action_ld, pairs.action_dim}, nullptr, nullptr, nullptr};
    if (encoder == nullptr) return p;
    const int columns = encoder->spec.sizes[0];
    p.rows = memory.floats(pairs.rows * columns);
    p.input = memory.floats(pairs.rows * columns);
    p.features = memory.floats(pairs.rows * outputs(encoder->spec));
    p.seen = {p.rows, columns, columns};
    return p;
}

// to[b] = [action[b] | from[b]]
struct BesideAction {
    static constexpr const char* kName = "beside_action";
    Pairs pairs;
    const float* from;  // (rows, columns - A)
    int64_t from_ld;
    int columns;
    float* to;  // (rows, columns)

    FLAME_BODY void operator()(int64_t i) const {
        const int64_t b = i / columns;
        const auto c = static_cast<int>(i % columns);
        const int n = pairs.action_dim;
        to[i] = c < n ? pairs.action[b * pairs.action_ld + c] : from[b * from_ld + c - n];
    }
};

template <typename Operations>
static inline void write_seen(const Operations& operations, const PairEncoder* encoder,
                              const SeenPairs& p) {
    if (encoder == nullptr) return;
    const MlpSpec& spec = encoder->spec;
    const int z = outputs(spec);
    const int columns = spec.sizes[0];
    const int64_t elements = p.pairs.rows * columns;
    const float* state = p.pairs.obs + p.pairs.obs_dim - z;
    for_elements(operations.launch, elements,
                 BesideAction{p.pairs, state, p.pairs.obs_ld, columns, p.input});
    operations.run(
        MlpForwardArgs{spec, encoder->parameters, p.pairs.rows, p.input, columns, p.features});
    for_elements(operations.launch, elements,
                 BesideAction{p.pairs, p.features, z, columns, p.rows});
}

}  // namespace flame::FLAME_ISA
