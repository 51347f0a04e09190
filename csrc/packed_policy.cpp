#include "packed_policy.h"

#include <algorithm>

#include "check.h"
#include "cpu/kernels.h"
#include "cpu/pack.h"
#include "thread_pool.h"

namespace flame {
namespace {

// Rows per thread that are worth waking a thread for (about 50 us of a 3 x 256 policy).
constexpr int64_t kGrain = 16;

// Of any size in a policy's file: their products, summed over all layers, stay far inside 64 bits.
constexpr int kLargestSize = 1 << 20;

// Kept between calls by each thread that acts: no allocation at acting time.
struct Scratch {
    AlignedBuffer workspace, obs, actions, q;
};

Scratch& scratch() {
    thread_local Scratch s;
    return s;
}

template <typename... What>
void check_size(int64_t size, int least, What... what) {
    check(size >= least && size <= kLargestSize, what..., " is ", size, "; it must be from ", least,
          " to ", kLargestSize);
}

void check_net(const NetDesc& net, const PackShape& shape, const char* name) {
    const auto layers = net.hidden.size();
    check(layers >= 1 && layers <= kMaxHiddenLayers, "the ", name, " has ", layers,
          " hidden layers; native acting takes 1 to ", kMaxHiddenLayers);
    for (const int width : net.hidden) check_size(width, 1, "a hidden layer's width in the ", name);
    const int64_t expected = flat_size(net, shape);
    check(net.size == expected, "the flat buffer of the ", name, " holds ", net.size,
          " floats, but its layer sizes need ", expected);
}

// A network as it is packed, once its sizes are seen to fit.
struct Part {
    Part(const NetDesc& net, const PackShape& shape, const char* name, int64_t steps,
         const float* features)
        : net(net), shape(shape), steps(steps), features(features) {
        if (members() > 0) check_net(net, shape, name);
    }

    int members() const { return net.flat == nullptr ? 0 : net.members; }
    int64_t member_floats() const { return packed_floats(net, shape, steps); }
    int64_t floats() const { return members() == 0 ? 0 : members() * member_floats(); }

    const NetDesc& net;
    PackShape shape;
    int64_t steps;
    const float* features;  // (steps, shape.num_features)
};

struct Parts {
    Part policy, state_encoder, pair_encoder, critics;
};

Parts parts_of(const PolicyDesc& d, int64_t steps) {
    const int actions = d.action_dim;
    const int z = d.embedding_dim;
    const int states = d.obs_dim + z;
    const PackShape policy = d.kind == PolicyKind::kFlow
                                 ? PackShape{actions, states, d.num_features, actions, d.precision}
                                 : PackShape{0, states, 0, 2 * actions, d.precision};
    return {
        {d.policy, policy, "policy", steps, d.time_features.data()},
        {d.state_encoder, {0, d.obs_dim, 0, z, d.precision}, "state encoder", 1, nullptr},
        {d.pair_encoder, {actions, z, 0, z, Precision::kFloat}, "pair encoder", 1, nullptr},
        {d.critics, {actions + z, states, 0, 1, Precision::kFloat}, "critics", 1, nullptr},
    };
}

void check_embeddings(const PolicyDesc& d) {
    const bool given = d.embedding_dim > 0;
    check(given == (d.state_encoder.flat != nullptr) && given == (d.pair_encoder.flat != nullptr),
          "embedding_dim is ", d.embedding_dim, "; with it, and only with it, give both encoders");
    check(!given || d.embedding_min_scale > 0, "embedding_min_scale is ", d.embedding_min_scale,
          "; it must be positive");
}

void check_length(const std::vector<float>& values, int expected, const char* name) {
    check(values.empty() || static_cast<int>(values.size()) == expected, name, " has ",
          values.size(), " elements, expected ", expected, " or none");
}

int32_t widest(const ActNet& net) {
    int32_t width = net.obs.outputs;
    for (int i = 0; i < net.num_hidden; ++i) width = std::max(width, net.hidden[i].outputs);
    return padded(width);
}

template <typename Real>
void gather(const MatrixView& from, float* to) {
    const char* row = static_cast<const char*>(from.data);
    for (int64_t i = 0; i < from.rows; ++i, row += from.row_stride) {
        if (from.column_stride == static_cast<int64_t>(sizeof(Real))) {
            const Real* values = reinterpret_cast<const Real*>(row);
            for (int64_t j = 0; j < from.columns; ++j) to[j] = static_cast<float>(values[j]);
        } else {
            for (int64_t j = 0; j < from.columns; ++j) {
                to[j] = static_cast<float>(
                    *reinterpret_cast<const Real*>(row + j * from.column_stride));
            }
        }
        to += from.columns;
    }
}

}  // namespace

PackedPolicy::PackedPolicy(const PolicyDesc& d)
    : obs_dim_(d.obs_dim),
      action_dim_(d.action_dim),
      kind_(d.kind),
      precision_(d.precision),
      embedding_dim_(d.embedding_dim),
      embedding_min_scale_(d.embedding_min_scale),
      log_std_min_(d.log_std_min),
      log_std_max_(d.log_std_max),
      obs_clip_(d.obs_clip),
      steps_(d.steps),
      obs_shift_(d.obs_shift),
      obs_scale_(d.obs_scale),
      action_low_(d.action_low),
      action_high_(d.action_high) {
    check_size(obs_dim_, 0, "obs_dim");
    check_size(action_dim_, 1, "action_dim");
    check_size(embedding_dim_, 0, "embedding_dim");
    check_size(d.num_features, 0, "the number of time features");
    check_size(static_cast<int64_t>(steps_.size()), 0, "the number of sampling steps");
    const bool flow = kind_ == PolicyKind::kFlow;
    check(!flow || !steps_.empty(), "a flow policy needs at least one sampling step");
    const int64_t steps = flow ? static_cast<int64_t>(steps_.size()) : 1;
    check(static_cast<int64_t>(d.time_features.size()) == (flow ? steps * d.num_features : 0),
          "time_features holds ", d.time_features.size(),
          " values, expected steps x features = ", steps, " x ", flow ? d.num_features : 0);
    check_length(obs_shift_, obs_dim_, "obs_shift");
    check_length(obs_scale_, obs_dim_, "obs_scale");
    check_length(action_low_, action_dim_, "action_low");
    check_length(action_high_, action_dim_, "action_high");
    check(obs_shift_.size() == obs_scale_.size() && action_low_.size() == action_high_.size(),
          "obs_shift comes with obs_scale, and action_low with action_high");

    check_embeddings(d);

    const Parts parts = parts_of(d, steps);
    int64_t floats = 0;
    for (const Part& part :
         {parts.policy, parts.state_encoder, parts.pair_encoder, parts.critics}) {
        floats += part.floats();
    }
    weight_bytes_ = (parts.policy.floats() + parts.state_encoder.floats()) *
                    static_cast<int64_t>(sizeof(float));
    storage_.resize(floats);
    float* place = storage_.data();
    const auto pack = [&](const Part& part, int member) {
        const ActNet net = pack_net(part.net, part.shape, member, part.features, part.steps, place);
        place += part.member_floats();
        width_ = std::max(width_, widest(net));
        return net;
    };
    policy_ = pack(parts.policy, 0);
    if (embedding_dim_ > 0) {
        state_encoder_ = pack(parts.state_encoder, 0);
        pair_encoder_ = pack(parts.pair_encoder, 0);
    }
    for (int i = 0; i < parts.critics.members(); ++i) critics_.push_back(pack(parts.critics, i));
}

const float* PackedPolicy::prepare_obs(const MatrixView& obs, int64_t* ld) const {
    const bool dense = obs.column_stride == static_cast<int64_t>(sizeof(float)) &&
                       obs.row_stride % static_cast<int64_t>(sizeof(float)) == 0;
    if (!obs.is_double && dense && obs_shift_.empty()) {
        *ld = obs.row_stride / static_cast<int64_t>(sizeof(float));
        return static_cast<const float*>(obs.data);
    }
    float* to = scratch().obs.at_least(obs.rows * obs.columns);
    if (obs.is_double) {
        gather<double>(obs, to);
    } else {
        gather<float>(obs, to);
    }
    *ld = obs.columns;
    if (obs_shift_.empty()) return to;
    for (float* row = to; row < to + obs.rows * obs.columns; row += obs.columns) {
        for (int64_t j = 0; j < obs.columns; ++j) {
            const float x = (row[j] - obs_shift_[j]) * obs_scale_[j];
            row[j] = x < -obs_clip_ ? -obs_clip_ : (x > obs_clip_ ? obs_clip_ : x);
        }
    }
    return to;
}

ActTask PackedPolicy::task(const float* obs, int64_t ld, int64_t states, int64_t particles) const {
    ActTask t = {};
    t.policy = &policy_;
    t.critics = critics_.data();
    t.num_critics = static_cast<int32_t>(critics_.size());
    t.kind = kind_;
    t.num_steps = static_cast<int32_t>(steps_.size());
    t.steps = steps_.data();
    t.log_std_min = log_std_min_;
    t.log_std_max = log_std_max_;
    t.precision = precision_;
    t.width = width_;
    t.state_encoder = embedding_dim_ > 0 ? &state_encoder_ : nullptr;
    t.pair_encoder = embedding_dim_ > 0 ? &pair_encoder_ : nullptr;
    t.embedding_dim = embedding_dim_;
    t.embedding_min_scale = embedding_min_scale_;
    t.obs = obs;
    t.obs_ld = ld;
    t.obs_dim = obs_dim_;
    t.action_dim = action_dim_;
    t.num_states = states;
    t.num_particles = particles;
    return t;
}

namespace {

void run(const ActTask& task) {
    const auto kernel = kernels().policy_act;
    parallel_for(task.num_states * task.num_particles, kGrain, [&](int64_t begin, int64_t end) {
        kernel(task, begin, end, scratch().workspace.at_least(policy_act_workspace(task)));
    });
}

// The particle with the largest q; NaN never wins against a number.
int64_t best_of(const float* q, int64_t count) {
    int64_t best = 0;
    for (int64_t i = 1; i < count; ++i) {
        if (q[i] > q[best] || (q[best] != q[best] && q[i] == q[i])) best = i;
    }
    return best;
}

}  // namespace

void PackedPolicy::act(const MatrixView& obs, int64_t num_particles, const float* noise,
                       PhiloxKey key, float* action) const {
    check(num_particles >= 1 && num_particles <= (1 << 24), "num_particles is ", num_particles,
          "; give 1 to ", 1 << 24);
    check(num_particles == 1 || has_critics(), "num_particles is ", num_particles,
          ", but the policy was packed without critics");
    if (obs.rows == 0) return;
    int64_t ld = 0;
    const float* prepared = prepare_obs(obs, &ld);
    ActTask t = task(prepared, ld, obs.rows, num_particles);
    t.noise = noise;
    t.key = key;
    t.action = action;
    if (num_particles == 1) {
        run(t);
    } else {
        const int64_t rows = obs.rows * num_particles;
        t.action = scratch().actions.at_least(rows * action_dim_);
        t.q = scratch().q.at_least(rows);
        run(t);
        for (int64_t s = 0; s < obs.rows; ++s) {
            const int64_t best =
                s * num_particles + best_of(t.q + s * num_particles, num_particles);
            std::copy_n(t.action + best * action_dim_, action_dim_, action + s * action_dim_);
        }
    }
    scale(action, obs.rows);
}

void PackedPolicy::scale(float* actions, int64_t rows) const {
    if (action_low_.empty()) return;
    for (float* row = actions; row < actions + rows * action_dim_; row += action_dim_) {
        for (int j = 0; j < action_dim_; ++j) {
            const double low = action_low_[j];
            const double high = action_high_[j];
            const double scaled = 0.5 * (high + low) + 0.5 * (high - low) * row[j];
            row[j] = static_cast<float>(std::clamp(scaled, low, high));  // NaN passes
        }
    }
}

float PackedPolicy::read_weights() const {
    return kernels().read_stream(storage_.data(),
                                 weight_bytes_ / static_cast<int64_t>(sizeof(float)));
}

void PackedPolicy::q_min(const MatrixView& obs, const float* action, float* q) const {
    check(has_critics(), "this policy was packed without critics, so it has no Q");
    if (obs.rows == 0) return;
    int64_t ld = 0;
    const float* prepared = prepare_obs(obs, &ld);
    ActTask t = task(prepared, ld, obs.rows, 1);
    t.policy = nullptr;
    t.action = const_cast<float*>(action);  // only read without a policy
    t.q = q;
    run(t);
}

}  // namespace flame
