// The target policy's marginal velocity at z by self-normalised importance weights over reverse
// candidates (FLAME, Sec. 4.1), in one pass: candidates -> twin Q -> softmax sums. Candidates and
// their Q values live for one tile only; nothing of size (B, K, A) is written.
//
// The softmax is online: each state keeps its running maximum logit and sums relative to it, in
// double, so Q / alpha may be anything finite. A state's candidates are visited in order by one
// task, so the sums do not depend on the number of threads.
#include <math.h>

#include "cpu/training_kernels.h"
#include "cpu/truncated_intervals.h"
#include "cpu/twin_q_tile.h"
#include "partition.h"
#include "philox.h"
#include "reverse_candidates.h"

namespace flame::FLAME_ISA {
namespace {

// Candidate rows per task: a small multiple of the tile, so that small batches give every thread
// work.
constexpr int kGroupRows = 96;

// Running sums of one state beside its velocity.
struct SoftmaxSums {
    double maximum;
    double weight;
    double weight2;
};

struct Group {
    int64_t first;  // state
    int states;
};

// Scratch of one task.
struct Scratch {
    TileBuffers tile;
    IntervalArrays intervals;  // (group states, padded A)
    int interval_ld;
    double* uniform;    // (padded A)
    float* order;       // (A, K) draws whose ranks are one state's strata
    float* action;      // (tile rows, A)
    float* seen;        // (tile rows, A + Z) what critics see of them, with a pair encoder
    float* noise;       // (tile rows, A)
    SoftmaxSums* sums;  // (group states)
    double* velocity;   // (group states, A)
    float* q;           // (tile rows)
    float* q_min;       // (tile rows)
};

Scratch make_scratch(const ReweightedArgs& a, int group_states, int rows, int width,
                     Workspace& workspace) {
    Scratch s{};
    s.tile = make_tile_buffers(rows, width, workspace);
    s.interval_ld = round_up(a.action_dim, kDoubles);
    const auto doubles = [&](size_t n) {
        return static_cast<double*>(workspace.bytes(n * sizeof(double)));
    };
    const size_t padded = static_cast<size_t>(group_states) * s.interval_ld;
    s.intervals = {doubles(padded), doubles(padded), doubles(padded),
                   doubles(padded), doubles(padded), doubles(padded)};
    s.uniform = doubles(s.interval_ld);
    for (int j = 0; j < s.interval_ld; ++j) s.uniform[j] = 0.5;  // the padding is computed too
    if (a.source == Candidates::kStratified) {
        s.order = workspace.floats(static_cast<size_t>(a.candidates) * a.action_dim);
    }
    s.action = workspace.floats(static_cast<size_t>(rows) * a.action_dim);
    if (a.pair) {
        s.seen =
            workspace.floats(static_cast<size_t>(rows) * (a.action_dim + pair_columns(a.pair)));
    }
    s.noise = workspace.floats(static_cast<size_t>(rows) * a.action_dim);
    s.sums = static_cast<SoftmaxSums*>(workspace.bytes(group_states * sizeof(SoftmaxSums)));
    s.velocity = doubles(static_cast<size_t>(group_states) * a.action_dim);
    s.q = workspace.floats(rows);
    s.q_min = workspace.floats(rows);
    return s;
}

// States per task: as many as fit kGroupRows candidates, in as many tasks for every thread. A state
// is never cut, so the bits do not depend on it.
int states_per_group(int64_t states, int candidates) {
    const int64_t threads = num_threads();
    const int64_t most = kGroupRows > candidates ? kGroupRows / candidates : 1;
    const int64_t fewest = divide_up(states, most);
    const int64_t groups = round_up(fewest, threads);
    return groups > 0 ? static_cast<int>(divide_up(states, groups)) : 1;
}

// --- Candidates

void set_intervals(const ReweightedArgs& a, const Group& group, const Scratch& s) {
    for (int i = 0; i < group.states; ++i) {
        const int64_t b = group.first + i;
        const double signal =
            posterior_is_uniform(a.signal[b]) ? kLeastSignal : static_cast<double>(a.signal[b]);
        const double scale = static_cast<double>(a.scale[b]);
        for (int j = 0; j < s.interval_ld; ++j) {
            const double z =
                j < a.action_dim ? static_cast<double>(a.z[b * a.action_dim + j]) : 0.0;
            set_interval(s.intervals, i * s.interval_ld + j,
                         truncated_interval((z - signal) / scale, (z + signal) / scale));
        }
    }
}

// Hands draws first .. first + n - 1 of a stream to write(i, draw).
template <typename Write>
void philox_uniforms(const ReweightedArgs& a, uint64_t stream, int64_t first, int64_t n,
                     Write&& write) {
    PhiloxBlock block{};
    for (int64_t i = 0; i < n; ++i) {
        const auto index = static_cast<uint64_t>(first + i);
        if (i == 0 || index % 4 == 0) block = philox_block(a.seed, stream, a.offset + index / 4);
        write(i, uniform_from_bits(block.v[index % 4]));
    }
}

// The draws that order one state's candidates in every coordinate.
void set_order(const ReweightedArgs& a, int64_t state, float* order) {
    const int n = a.action_dim;
    const int64_t count = static_cast<int64_t>(a.candidates) * n;
    philox_uniforms(a, a.stream + 2, state * count, count,
                    [&](int64_t i, float u) { order[i % n * a.candidates + i / n] = u; });
}

void candidate_uniforms(const ReweightedArgs& a, const Scratch& s, int64_t state, int k) {
    const int n = a.action_dim;
    const int64_t at = (state * a.candidates + k) * n;
    double* out = s.uniform;
    if (a.source == Candidates::kGiven) {
        for (int j = 0; j < n; ++j) out[j] = static_cast<double>(a.uniform[at + j]);
    } else {
        philox_uniforms(a, a.stream, at, n,
                        [&](int64_t j, float u) { out[j] = static_cast<double>(u); });
    }
    if (a.source == Candidates::kStratified) {
        if (k == 0) set_order(a, state, s.order);
        for (int j = 0; j < n; ++j) {
            const float* order = s.order + static_cast<int64_t>(j) * a.candidates;
            out[j] = in_stratum(rank_of(order, a.candidates, k), a.candidates, out[j]);
        }
    }
    for (int j = 0; j < n; ++j) out[j] = inside_unit(out[j]);
}

// Action and noise of one candidate.
void make_candidate(const ReweightedArgs& a, const Scratch& s, int64_t state, int position,
                    float* action, float* noise) {
    const int n = a.action_dim;
    const float* z = a.z + state * n;
    const float signal = a.signal[state];
    const bool uniform = posterior_is_uniform(signal);
    double x[kDoubles] = {};
    for (int j = 0; j < n; j += kDoubles) {
        if (!uniform) {
            store_d(x, truncated_normal(s.intervals, position * s.interval_ld + j,
                                        load_d(s.uniform + j)));
        }
        for (int i = 0; i < kDoubles && j + i < n; ++i) {
            const ReverseCandidate c =
                reverse_candidate(z[j + i], signal, a.scale[state], s.uniform[j + i], x[i]);
            action[j + i] = c.action;
            noise[j + i] = c.noise;
        }
    }
}

// --- Softmax

void clear_sums(const ReweightedArgs& a, const Group& group, const Scratch& s) {
    for (int i = 0; i < group.states; ++i) s.sums[i] = {-HUGE_VAL, 0.0, 0.0};
    for (int i = 0; i < group.states * a.action_dim; ++i) s.velocity[i] = 0.0;
}

void add_candidate(const ReweightedArgs& a, const Scratch& s, int position, double logit, int row) {
    if (logit == -HUGE_VAL) return;  // no weight, and relative to it nothing has one
    SoftmaxSums& sums = s.sums[position];
    double* velocity = s.velocity + position * a.action_dim;
    const float* action = s.action + row * a.action_dim;
    const float* noise = s.noise + row * a.action_dim;
    if (logit > sums.maximum || logit != logit) {
        const double shrink = __builtin_exp(sums.maximum - logit);
        sums.maximum = logit;
        sums.weight *= shrink;
        sums.weight2 *= shrink * shrink;
        for (int j = 0; j < a.action_dim; ++j) velocity[j] *= shrink;
    }
    const double weight = __builtin_exp(logit - sums.maximum);  // NaN where both are infinite
    sums.weight += weight;
    sums.weight2 += weight * weight;
    for (int j = 0; j < a.action_dim; ++j) {
        velocity[j] += weight * (static_cast<double>(noise[j]) - static_cast<double>(action[j]));
    }
}

void write_results(const ReweightedArgs& a, const Group& group, const Scratch& s) {
    for (int i = 0; i < group.states; ++i) {
        const SoftmaxSums& sums = s.sums[i];
        const int64_t b = group.first + i;
        for (int j = 0; j < a.action_dim; ++j) {
            a.velocity[b * a.action_dim + j] =
                static_cast<float>(s.velocity[i * a.action_dim + j] / sums.weight);
        }
        a.ess[b] = static_cast<float>(sums.weight * sums.weight / sums.weight2);
    }
}

// --- Tiles

struct Networks {
    PackedMlp packed_critics;
    PackedMlp packed_pair;
    CandidateNetwork critics;
    CandidateNetwork pair;  // packed is null without one
    int width;              // of the wider one's rows
};

void prepare_networks(const ReweightedArgs& a, Workspace& workspace, Networks& n) {
    pack_mlp(a.spec, a.parameters, {false, 0}, workspace, n.packed_critics);
    const int features = pair_columns(a.pair);
    n.critics = prepare_candidates(a.spec, n.packed_critics, a.action_dim + features, a.states,
                                   a.obs, a.obs_ld, workspace);
    n.width = n.critics.width;
    n.pair = {};
    if (!a.pair) return;
    pack_mlp(a.pair->spec, a.pair->parameters, {false, 0}, workspace, n.packed_pair);
    const int obs_dim = obs_columns(a.spec, a.action_dim, a.pair);
    n.pair = prepare_candidates(a.pair->spec, n.packed_pair, a.action_dim, a.states,
                                a.obs + obs_dim - features, a.obs_ld, workspace);
    if (n.pair.width > n.width) n.width = n.pair.width;
}

// The candidates as critics see them, [action | features].
CandidateRows seen_rows(const ReweightedArgs& a, const CandidateNetwork& pair, const Scratch& s,
                        const CandidateRows& plain) {
    const int features = pair_columns(a.pair);
    const int ld = a.action_dim + features;
    with_activation(pair.activation, [&](auto act) {
        const float* output = candidate_output_tile<decltype(act)>(pair, plain, s.tile);
        for (int i = 0; i < plain.rows; ++i) {
            float* to = s.seen + i * ld;
            std::memcpy(to, plain.actions + i * plain.action_ld, a.action_dim * sizeof(float));
            std::memcpy(to + a.action_dim, output + i * s.tile.ld, features * sizeof(float));
        }
    });
    return {plain.first, plain.candidates, plain.rows, s.seen, ld};
}

// Rows [first, first + rows) of the group's flat (state, k) range.
template <typename Act>
void reweight_tile(const ReweightedArgs& a, const Networks& networks, const Group& group,
                   const Scratch& s, int64_t first, int rows) {
    for (int i = 0; i < rows; ++i) {
        const int64_t index = first + i;
        const int64_t state = index / a.candidates;
        candidate_uniforms(a, s, state, static_cast<int>(index % a.candidates));
        make_candidate(a, s, state, static_cast<int>(state - group.first),
                       s.action + i * a.action_dim, s.noise + i * a.action_dim);
    }
    CandidateRows candidates{first, a.candidates, rows, s.action, a.action_dim};
    if (a.pair) candidates = seen_rows(a, networks.pair, s, candidates);
    for (int m = 0; m < a.spec.members; ++m) {
        candidate_q_tile<Act>(networks.critics, m, candidates, s.tile, s.q);
        take_minimum(m == 0, rows, s.q, s.q_min);
    }
    for (int i = 0; i < rows; ++i) {
        const int64_t state = (first + i) / a.candidates;
        const int position = static_cast<int>(state - group.first);
        add_candidate(a, s, position, static_cast<double>(s.q_min[i]) / a.alpha, i);
    }
}

}  // namespace

void reweighted_velocity(const ReweightedArgs& a) {
    Workspace workspace;
    Networks networks;
    prepare_networks(a, workspace, networks);
    const int group_states = states_per_group(a.states, a.candidates);
    const int limit = tile_rows(networks.width);
    parallel_for(divide_up(a.states, group_states), 1, [&](int64_t begin, int64_t end) {
        Workspace memory;
        const Scratch s = make_scratch(a, group_states, limit, networks.width, memory);
        for (int64_t g = begin; g < end; ++g) {
            const int64_t state = g * group_states;
            const Group group{state, row_count(state, a.states, group_states)};
            set_intervals(a, group, s);
            clear_sums(a, group, s);
            const int64_t start = group.first * a.candidates;
            const int64_t total = static_cast<int64_t>(group.states) * a.candidates;
            const RowCut cut{total, fewest_chunks(total, limit)};
            for (int64_t c = 0; c < cut.chunks; ++c) {
                const RowRange range = cut[c];
                with_activation(a.spec.activation, [&](auto act) {
                    reweight_tile<decltype(act)>(a, networks, group, s, start + range.first,
                                                 range.rows);
                });
            }
            write_results(a, group, s);
        }
    });
}

}  // namespace flame::FLAME_ISA
