// A policy (and its critics) packed once for acting; immutable afterwards, so that any number of
// threads may act with one object.
#pragma once

#include <cstdint>
#include <vector>

#include "aligned_buffer.h"
#include "cpu/policy_act.h"

namespace flame {

// An ensemble of MLPs over one flat float32 buffer, as flame_ext/networks.py documents its layout.
struct NetDesc {
    const float* flat = nullptr;
    int64_t size = 0;
    int members = 1;
    std::vector<int> hidden;
    Activation activation = Activation::kMish;
    bool layer_norm = false;
};

struct PolicyDesc {
    PolicyKind kind = PolicyKind::kFlow;
    int obs_dim = 0;
    int action_dim = 0;
    NetDesc policy;
    NetDesc critics;  // flat is null: without critics
    // Learned embeddings (flame_ext/embeddings.py), whose networks' flat is null without them.
    NetDesc state_encoder, pair_encoder;
    int embedding_dim = 0;
    float embedding_min_scale = 0.0f;
    Precision precision = Precision::kFloat;
    std::vector<float> time_features;  // (steps, num_features); empty for kGaussian
    int num_features = 0;
    std::vector<ActStep> steps;
    float log_std_min = 0.0f, log_std_max = 0.0f;
    // Optional, each of its dimension: obs -> clip((obs - shift) * scale, -obs_clip, obs_clip) on
    // entry, action in [-1, 1] -> [action_low, action_high] on return, never outside by rounding.
    std::vector<float> obs_shift, obs_scale;
    float obs_clip = 0.0f;
    std::vector<float> action_low, action_high;
};

// Any strided matrix of float32 or float64; strides in bytes.
struct MatrixView {
    const void* data;
    bool is_double;
    int64_t rows, columns;
    int64_t row_stride, column_stride;
};

class PackedPolicy {
  public:
    // Copies everything it needs. Throws when sizes do not fit or a weight is not representable.
    explicit PackedPolicy(const PolicyDesc& desc);

    // obs (B, obs_dim); noise (B * num_particles, action_dim) or null for the draws of `key`;
    // action (B, action_dim). With num_particles > 1 the particle with the largest Qmin is
    // returned.
    void act(const MatrixView& obs, int64_t num_particles, const float* noise, PhiloxKey key,
             float* action) const;

    // Qmin of actions in [-1, 1]: action (B, action_dim), q (B).
    void q_min(const MatrixView& obs, const float* action, float* q) const;

    int obs_dim() const { return obs_dim_; }
    int action_dim() const { return action_dim_; }
    bool has_critics() const { return !critics_.empty(); }
    int64_t weight_bytes() const { return weight_bytes_; }
    // Reads the policy's weights once and does nothing else; returns a sum so that it is not
    // skipped.
    float read_weights() const;

  private:
    const float* prepare_obs(const MatrixView& obs, int64_t* ld) const;
    void scale(float* actions, int64_t rows) const;
    ActTask task(const float* obs, int64_t ld, int64_t states, int64_t particles) const;

    int obs_dim_, action_dim_;
    PolicyKind kind_;
    Precision precision_;
    int embedding_dim_;
    float embedding_min_scale_, log_std_min_, log_std_max_, obs_clip_;
    std::vector<ActStep> steps_;
    std::vector<float> obs_shift_, obs_scale_, action_low_, action_high_;
    AlignedBuffer storage_;
    ActNet policy_, state_encoder_, pair_encoder_;  // encoders only with embeddings
    std::vector<ActNet> critics_;
    int32_t width_ = 0;
    int64_t weight_bytes_ = 0;
};

}  // namespace flame
