// Best of N actions for a few rows (states times particles) by cooperating blocks, in one launch.
//
// Every hidden layer's units are shared out over the blocks. A block copies its rows of all weight
// matrices, and all of the output layers, to shared memory as it starts: each weight is read once,
// by one multiprocessor, and nothing but activations moves afterwards. A stage is a hidden layer:
// the blocks write their units' values to global memory and meet at the barrier, then every block
// takes all of them. What is small is computed by every block again, because that is cheaper than a
// barrier: LayerNorm with its activation, outputs, the step of z. Both critics pass through the
// same stages, their units side by side; block 0 chooses.
//
// Layout: exchange (members, rows, padded(units)), two of them taking turns, in the caller's
// workspace; in shared memory weights as in the flat buffer, z (rows, A), q (members, rows) and
// x (members, rows, padded(units)), what the present layer reads. A unit is one warp's dot product
// for kRows rows at a time; its order of addition depends on neither rows nor blocks.
//
// Expected on an H100 for 55 -> 3 x 256 -> 6, one row, 32 blocks: 0.59 MB of weights, 18 KB a block
// and 6 KB of output weights in each, 0.3 us at about 80 GB/s for a multiprocessor behind 1 us of
// latency; 0.3 MFLOP, nothing. Three barriers of about 1 us, taking and multiplying 0.4 us each, 2
// us for the launch: 7 to 8 us, against 7 us for the weights alone through one multiprocessor. The
// time features are constant, but folding them into a bias takes a launch whenever weights change
// and saves 6 % of the bytes. Best of 16 adds 1.1 MB of critics and three barriers.
#pragma once

#include "cuda/async_copy.h"
#include "cuda/best_action.h"
#include "cuda/launch.h"
#include "cuda/mlp_tile.h"
#include "cuda/training.h"
#include "cuda/twin_q.h"
#include "partition.h"
#include "scalar_rules.h"

namespace flame::FLAME_ISA {

constexpr int kFewRows = 32;
constexpr int kVector = 4;  // floats of one copy

// A network whose hidden units are shared out.
struct SharedOutMlp {
    MlpView net;
    int units[kMaxLayers];    // of one block, of all members; all outputs in the last layer
    int weights[kMaxLayers];  // where they begin in shared memory
};

template <int kRows>
struct PolicyActKernel {
    static constexpr const char* kName = "policy_act";
    PolicyActArgs a;
    SharedOutMlp policy;
    SharedOutMlp critics;  // not read with one sample
    int stages;
    int rows;
    int z_at;  // in shared memory, like the next two
    int q_at;
    int x_at;
    float* exchange[2];

    FLAME_BODY void operator()(const Block& block, int stage) const {
        const int hidden = policy.net.num_layers - 1;
        const int deciding = a.steps * hidden;  // the first stage behind the policy
        const float* received = exchange[(stage + 1) % 2];
        float* sent = exchange[stage % 2];
        const bool last = stage + 1 == stages;
        if (last && block.index != 0) return;
        if (stage == 0) return begin(block, sent);
        if (stage > deciding) {
            take(block, critics, stage - deciding - 1, received);
            return last ? put_best(block) : units(block, critics, stage - deciding, sent);
        }
        const bool acting = stage < deciding;
        if (acting && stage % hidden > 0) {
            take(block, policy, stage % hidden - 1, received);
            return units(block, policy, stage % hidden, sent);
        }
        take(block, policy, hidden - 1, received);
        advance(block, stage / hidden - 1);
        if (last) return put_only(block);
        set_input(block, stage / hidden, acting ? a.time_features : 0);
        settle(block);
        units(block, acting ? policy : critics, 0, sent);
    }

    // --- Weights

    // This block's units of a layer: `first` counts over members.
    FLAME_BODY void locate(const SharedOutMlp& m, int layer, int64_t block, int& first,
                           int& count) const {
        const bool output = layer == m.net.num_layers - 1;
        first = output ? 0 : static_cast<int>(block) * m.units[layer];
        count = row_count(first, m.net.members * m.net.layers[layer].out, m.units[layer]);
    }

    // Whole vectors around the units' weights, which lie together; the flat buffer has them.
    FLAME_BODY void fetch(const Block& block, const SharedOutMlp& m, int thread) const {
        for (int l = 0; l < m.net.num_layers; ++l) {
            const LayerView& layer = m.net.layers[l];
            int first;
            int count;
            locate(m, l, block.index, first, count);
            if (count <= 0) continue;
            const int64_t from = static_cast<int64_t>(first) * layer.in / kVector * kVector;
            const int64_t end = static_cast<int64_t>(first + count) * layer.in;
            float* to = block.shared + m.weights[l];
            for (int64_t i = kVector * thread; from + i < end; i += kVector * kThreads) {
                copy_async<kVector>(to + i, layer.weight + from + i);
            }
        }
    }

    // --- Inputs

    FLAME_BODY void begin(const Block& block, float* sent) const {
        block.each_thread([&](int t) {
            fetch(block, policy, t);
            float* z = block.shared + z_at;
            for (int i = t; i < rows * a.action_dim; i += kThreads) z[i] = a.noise[i];
        });
        set_input(block, 0, a.time_features);
        // The critics' weights may come later.
        block.each_thread([&](int t) {
            commit_copies();
            if (a.samples > 1) fetch(block, critics, t);
            commit_copies();
            await_copies<1>();
        });
        units(block, policy, 0, sent);
    }

    // x <- [z | observation | the step's first `features` time features]; the copies are on their
    // way.
    FLAME_BODY void set_input(const Block& block, int step, int features) const {
        const int n = a.action_dim;
        const int obs_dim = policy.net.layers[0].in - n - a.time_features;
        const int ld = padded(n + obs_dim + features);
        const float* z = block.shared + z_at;
        float* x = block.shared + x_at;
        block.each_warp([&](const Warp& warp) {
            for (int r = warp.index; r < rows; r += kWarps) {
                float* row = x + r * ld;
                const float* obs = a.obs + r / a.samples * a.obs_ld;
                const float* time = a.time + static_cast<int64_t>(step) * a.time_features;
                warp.each(n, [&](int c) { row[c] = z[r * n + c]; });
                warp.each(obs_dim, [&](int c) { copy_async<1>(row + n + c, obs + c); });
                warp.each(features, [&](int c) { copy_async<1>(row + n + obs_dim + c, time + c); });
            }
        });
    }

    FLAME_BODY void settle(const Block& block) const {
        block.each_thread([&](int) {
            commit_copies();
            await_copies<0>();
        });
    }

    // x <- all of a hidden layer's values, of every member.
    FLAME_BODY void take(const Block& block, const SharedOutMlp& m, int layer,
                         const float* received) const {
        const int ld = padded(m.net.layers[layer].out);
        const int lines = m.net.members * rows;
        float* x = block.shared + x_at;
        block.each_thread([&](int t) {
            for (int i = kVector * t; i < lines * ld; i += kVector * kThreads) {
                copy_async<kVector>(x + i, received + i);
            }
        });
        settle(block);
        if (m.net.layers[layer].gain == nullptr) return;
        block.each_warp([&](const Warp& warp) {
            with_activation(m.net.activation, [&](auto act) {
                for (int i = warp.index; i < lines; i += kWarps) {
                    activate_sample<decltype(act), Record::kNothing>(
                        warp, member_layer(m.net, layer, i / rows), x + i * ld, ld, 0, {});
                }
            });
        });
    }

    // --- Products

    // emit(member, unit of the layer, row, value) for this block's units of a layer and every row.
    template <typename Emit>
    FLAME_BODY void multiply_units(const Block& block, const SharedOutMlp& m, int index,
                                   Emit&& emit) const {
        const LayerView& layer = m.net.layers[index];
        const int ld = padded(layer.in);
        const int groups = divide_up(rows, kRows);
        int first;
        int count;
        locate(m, index, block.index, first, count);
        const float* weights =
            block.shared + m.weights[index] + static_cast<int64_t>(first) * layer.in % kVector;
        block.each_warp([&](const Warp& warp) {
            for (int i = warp.index; i < count * groups; i += kWarps) {
                const int unit = first + i / groups;
                const int member = unit / layer.out;
                const int row = i % groups * kRows;
                const float bias = layer.bias[unit];
                const float* w = weights + i / groups * layer.in;
                // The first layer's inputs serve all members.
                const float* x = block.shared + x_at + (index > 0 ? member * rows * ld : 0);
                const float* line[kRows];
                FLAME_UNROLL
                for (int r = 0; r < kRows; ++r) {
                    line[r] = x + (row + r < rows ? row + r : row) * ld;
                }
                const auto sums = warp.template sums<kRows>(
                    layer.in, [&](int c, int r) { return line[r][c] * w[c]; });
                warp.each(row_count(row, rows, kRows), [&](int r) {
                    emit(member, unit - member * layer.out, row + r, sums.at(r) + bias);
                });
            }
        });
    }

    // A hidden layer. Without LayerNorm its owner activates a unit.
    FLAME_BODY void units(const Block& block, const SharedOutMlp& m, int index, float* sent) const {
        const int out = m.net.layers[index].out;
        const int ld = padded(out);
        const bool norm = m.net.layers[index].gain != nullptr;
        multiply_units(block, m, index, [&](int member, int unit, int row, float value) {
            float* line = sent + static_cast<int64_t>(member * rows + row) * ld;
            if (!norm) {
                with_activation(m.net.activation,
                                [&](auto act) { value = decltype(act)::value(value); });
            }
            line[unit] = value;
            if (unit + 1 < out) return;
            for (int c = out; c < ld; ++c) line[c] = 0.0f;
        });
    }

    // z <- z + scale u, clipped after the last step.
    FLAME_BODY void advance(const Block& block, int step) const {
        float* z = block.shared + z_at;
        const float scale = a.scale[step];
        const bool last = step + 1 == a.steps;
        multiply_units(block, policy, policy.net.num_layers - 1,
                       [&](int, int unit, int row, float u) {
                           float& to = z[row * a.action_dim + unit];
                           to = fmaf(scale, u, to);
                           if (last) to = into_box(to);
                       });
    }

    // --- Results, of one block

    FLAME_BODY void put_only(const Block& block) const {
        block.each_thread([&](int t) {
            for (int i = t; i < rows * a.action_dim; i += kThreads) {
                a.action[i] = block.shared[z_at + i];
            }
        });
    }

    FLAME_BODY void put_best(const Block& block) const {
        float* q = block.shared + q_at;
        multiply_units(
            block, critics, critics.net.num_layers - 1,
            [&](int member, int, int row, float value) { q[member * rows + row] = value; });
        block.each_thread([&](int r) {
            if (r >= rows) return;
            for (int m = 1; m < critics.net.members; ++m) {
                if (takes_minimum(q[m * rows + r], q[r])) q[r] = q[m * rows + r];
            }
        });
        block.each_warp([&](const Warp& warp) {
            for (int s = warp.index; s < a.states; s += kWarps) {
                const int first = s * a.samples;
                choose_action(warp, a, s, q + first, block.shared + z_at + first * a.action_dim);
            }
        });
    }
};

// --- Host side

struct FewPlan {
    int blocks;
    SharedOutMlp policy;
    SharedOutMlp critics;
    int stages;
    int z_at;
    int q_at;
    int x_at;
    size_t shared;    // floats, like the next
    size_t exchange;  // of each of the two
};

// `used`: floats of shared memory so far.
static inline SharedOutMlp share_out(const MlpSpec& spec, const float* parameters, int blocks,
                                     size_t& used) {
    SharedOutMlp m{make_view(spec, parameters), {}, {}};
    for (int l = 0; l < spec.num_layers; ++l) {
        const int all = spec.members * spec.sizes[l + 1];
        m.units[l] = l + 1 < spec.num_layers ? divide_up(all, blocks) : all;
        m.weights[l] = static_cast<int>(used);
        const size_t floats = static_cast<size_t>(m.units[l]) * spec.sizes[l];
        used += round_up(floats + kVector - 1, kVector);
    }
    return m;
}

// Units of the widest hidden layer, of all members.
static inline int widest_hidden(const MlpSpec& spec) {
    int widest = 0;
    for (int l = 1; l < spec.num_layers; ++l) {
        const int units = spec.members * spec.sizes[l];
        if (units > widest) widest = units;
    }
    return widest;
}

// Floats of what one row of a network's hidden layers takes, of all members.
static inline size_t hidden_floats(const MlpSpec& spec) {
    size_t most = 0;
    for (int l = 1; l < spec.num_layers; ++l) {
        const size_t floats = static_cast<size_t>(spec.members) * padded(spec.sizes[l]);
        if (floats > most) most = floats;
    }
    return most;
}

static inline FewPlan few_plan(const PolicyActArgs& a, int blocks) {
    FewPlan plan{};
    size_t used = 0;
    plan.blocks = blocks;
    plan.policy = share_out(a.policy, a.parameters, blocks, used);
    plan.stages = a.steps * (a.policy.num_layers - 1) + 1;
    size_t hidden = hidden_floats(a.policy);
    size_t line = padded(a.policy.sizes[0]);  // wider than the critics': it has the time features
    if (a.samples > 1) {
        plan.critics = share_out(a.critics, a.critic_parameters, blocks, used);
        plan.stages += a.critics.num_layers - 1;
        if (hidden_floats(a.critics) > hidden) hidden = hidden_floats(a.critics);
    }
    if (hidden > line) line = hidden;
    const size_t rows = static_cast<size_t>(a.states) * a.samples;
    plan.exchange = rows * hidden;
    plan.z_at = static_cast<int>(used);
    used += rows * a.action_dim;
    plan.q_at = static_cast<int>(used);
    used = round_up(used + (a.samples > 1 ? rows * a.critics.members : 0), kVector);
    plan.x_at = static_cast<int>(used);
    plan.shared = used + rows * line;
    return plan;
}

static inline bool whole_vectors(const float* data) {
    return reinterpret_cast<uintptr_t>(data) % sizeof(Vec4) == 0;
}

// A plan, or one of no blocks where tiles must do: too many rows, no hidden layers to share out,
// weights that do not fit all multiprocessors' shared memory, or blocks that cannot cooperate.
static inline FewPlan find_few_plan(const Launcher& launch, const PolicyActArgs& a) {
    constexpr int kEnoughBlocks = 64;  // more make the barriers slower
    const bool choosing = a.samples > 1;
    const int most = launch.cooperating_multiprocessors();
    if (most == 0 || a.states * a.samples > kFewRows || a.policy.num_layers < 2 ||
        !whole_vectors(a.parameters) ||
        (choosing && (a.critics.num_layers < 2 || !whole_vectors(a.critic_parameters)))) {
        return {};
    }
    int units = widest_hidden(a.policy);
    if (choosing && widest_hidden(a.critics) > units) units = widest_hidden(a.critics);
    int blocks = divide_up(units, kWarps);
    if (blocks > kEnoughBlocks) blocks = kEnoughBlocks;
    for (; blocks < most; blocks *= 2) {
        const FewPlan plan = few_plan(a, blocks);
        if (plan.shared <= launch.shared_limit()) return plan;
    }
    const FewPlan plan = few_plan(a, most);
    return plan.shared <= launch.shared_limit() ? plan : FewPlan{};
}

template <int kRows>
static void launch_few(const Launcher& launch, const PolicyActArgs& a, const FewPlan& plan,
                       float* exchange) {
    const PolicyActKernel<kRows> kernel{a,
                                        plan.policy,
                                        plan.critics,
                                        plan.stages,
                                        static_cast<int>(a.states) * a.samples,
                                        plan.z_at,
                                        plan.q_at,
                                        plan.x_at,
                                        {exchange, exchange + plan.exchange}};
    launch.in_stages(kernel, plan.stages, plan.blocks, plan.shared);
}

static inline float* carve_few(const FewPlan& plan, Carver& memory) {
    return memory.floats(2 * plan.exchange);
}

static inline void act_few(const Launcher& launch, const PolicyActArgs& a, const FewPlan& plan,
                           Carver& memory) {
    float* exchange = carve_few(plan, memory);
    if (a.states * a.samples == 1) return launch_few<1>(launch, a, plan, exchange);
    launch_few<4>(launch, a, plan, exchange);
}

}  // namespace flame::FLAME_ISA
