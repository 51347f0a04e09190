#include "embeddings.h"

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/record_memory.h"
#include "embedding_scale.h"

namespace flame {
namespace {

// The embedding of a state from its features (Z); `to` may be the same memory.
void normalise(const StateEncoder& encoder, const float* features, float* to) {
    const int z = outputs(encoder.spec);
    const float scale = embedding_scale(features, z, encoder.min_scale);
    for (int j = 0; j < z; ++j) to[j] = features[j] / scale;
}

// From the gradient with respect to the embedding to that with respect to the features, in place.
void normalise_gradient(const StateEncoder& encoder, const float* features, float* gradient) {
    const int z = outputs(encoder.spec);
    const auto least = static_cast<double>(encoder.min_scale);
    const double mean = mean_absolute_value(features, z);
    const double scale = std::max(mean, least);
    double along = 0.0;
    for (int j = 0; j < z; ++j) {
        along += static_cast<double>(gradient[j]) * static_cast<double>(features[j]);
    }
    // Where the scale is the least one it is a constant.
    const double by_size = mean >= least ? along / (scale * scale * z) : 0.0;
    for (int j = 0; j < z; ++j) {
        const double sign = features[j] > 0.0f ? 1.0 : features[j] < 0.0f ? -1.0 : 0.0;
        gradient[j] = static_cast<float>(static_cast<double>(gradient[j]) / scale - by_size * sign);
    }
}

float* plain_features(const StateEncoder& encoder, int64_t rows, const float* obs, int64_t obs_ld,
                      Workspace& workspace) {
    float* features = workspace.floats(rows * outputs(encoder.spec));
    kernels(encoder.spec)
        .mlp_forward({encoder.spec, encoder.parameters, rows, obs, obs_ld, features});
    return features;
}

struct PairRows {
    float* input;  // (rows, A + Z) [action | zs]
    float* seen;   // (rows, A + Z) [action | features], features missing
    float* features;
    int columns;
};

PairRows make_rows(const PairEncoder& encoder, const Pairs& pairs, Workspace& workspace) {
    const int n = pairs.action_dim;
    const int z = outputs(encoder.spec);
    const PairRows r{workspace.floats(pairs.rows * (n + z)), workspace.floats(pairs.rows * (n + z)),
                     workspace.floats(pairs.rows * z), n + z};
    for (int64_t b = 0; b < pairs.rows; ++b) {
        const float* action = pairs.action + b * pairs.action_ld;
        const float* state = pairs.obs + b * pairs.obs_ld + pairs.obs_dim - z;
        std::copy_n(state, z, std::copy_n(action, n, r.input + b * r.columns));
        std::copy_n(action, n, r.seen + b * r.columns);
    }
    return r;
}

SeenActions with_features(const PairRows& r, const Pairs& pairs) {
    const int n = pairs.action_dim;
    const int z = r.columns - n;
    for (int64_t b = 0; b < pairs.rows; ++b) {
        std::copy_n(r.features + b * z, z, r.seen + b * r.columns + n);
    }
    return {r.seen, r.columns, r.columns};
}

SeenActions plain_actions(const Pairs& pairs) {
    return {pairs.action, pairs.action_ld, pairs.action_dim};
}

}  // namespace

void observe(const Observe& args) {
    if (args.rows == 0) return;
    Workspace workspace;
    const int obs_dim = args.encoder.spec.sizes[0];
    const int z = outputs(args.encoder.spec);
    const float* features =
        plain_features(args.encoder, args.rows, args.obs, args.obs_ld, workspace);
    for (int64_t b = 0; b < args.rows; ++b) {
        float* to = args.observed + b * (obs_dim + z);
        to = std::copy_n(args.obs + b * args.obs_ld, obs_dim, to);
        normalise(args.encoder, features + b * z, to);
    }
}

SeenActions seen_actions(const PairEncoder* encoder, const Pairs& pairs, Workspace& workspace) {
    if (!encoder) return plain_actions(pairs);
    const PairRows r = make_rows(*encoder, pairs, workspace);
    kernels(encoder->spec)
        .mlp_forward(
            {encoder->spec, encoder->parameters, pairs.rows, r.input, r.columns, r.features});
    return with_features(r, pairs);
}

RecordedPairs record_pairs(const PairEncoder* encoder, const Pairs& pairs, Workspace& memory) {
    if (!encoder) return {plain_actions(pairs), nullptr};
    const PairRows r = make_rows(*encoder, pairs, memory);
    MlpTape* tape =
        kernels(encoder->spec)
            .mlp_record(
                {{encoder->spec, encoder->parameters, pairs.rows, r.input, r.columns, r.features},
                 pairs.action_dim},
                memory);
    return {with_features(r, pairs), tape};
}

void pair_gradient(const RecordedPairs& recorded, const Pairs& pairs, const float* by_seen,
                   float* by_action) {
    const int n = pairs.action_dim;
    const int z = recorded.seen.columns - n;
    Workspace workspace;
    float* by_features = workspace.floats(pairs.rows * z);
    for (int64_t b = 0; b < pairs.rows; ++b) {
        std::copy_n(by_seen + b * (n + z) + n, z, by_features + b * z);
    }
    recorded.tape->backward({recorded.tape, by_features, nullptr, by_action});
    for (int64_t b = 0; b < pairs.rows; ++b) {
        for (int j = 0; j < n; ++j) by_action[b * n + j] += by_seen[b * (n + z) + j];
    }
}

double encoder_step(const EncoderStep& args) {
    const int z = outputs(args.state.spec);
    const int n = args.pair.spec.sizes[0] - z;
    const int64_t count = args.rows * z;
    RecordMemory memory;
    Workspace workspace;
    float* features = workspace.floats(count);
    MlpTape* state = kernels(args.state.spec)
                         .mlp_record({{args.state.spec, args.state.parameters, args.rows, args.obs,
                                       args.obs_ld, features},
                                      0},
                                     *memory);
    float* input = workspace.floats(args.rows * (n + z));
    for (int64_t b = 0; b < args.rows; ++b) {
        float* to = std::copy_n(args.action + b * args.action_ld, n, input + b * (n + z));
        normalise(args.state, features + b * z, to);
    }
    float* error = workspace.floats(count);
    MlpTape* pair =
        kernels(args.pair.spec)
            .mlp_record(
                {{args.pair.spec, args.pair.parameters, args.rows, input, n + z, error}, n + z},
                *memory);
    float* next = plain_features(args.state, args.rows, args.next_obs, args.next_obs_ld, workspace);
    double loss = 0.0;
    for (int64_t b = 0; b < args.rows; ++b) normalise(args.state, next + b * z, next + b * z);
    for (int64_t i = 0; i < count; ++i) {
        error[i] -= next[i];
        loss += static_cast<double>(error[i]) * static_cast<double>(error[i]);
        error[i] *= 2.0f / static_cast<float>(count);
    }
    float* by_input = workspace.floats(args.rows * (n + z));
    pair->backward({pair, error, args.pair_gradients, by_input});
    float* by_features = workspace.floats(count);
    for (int64_t b = 0; b < args.rows; ++b) {
        std::copy_n(by_input + b * (n + z) + n, z, by_features + b * z);
        normalise_gradient(args.state, features + b * z, by_features + b * z);
    }
    state->backward({state, by_features, args.state_gradients, nullptr});
    return loss / static_cast<double>(count);
}

}  // namespace flame
