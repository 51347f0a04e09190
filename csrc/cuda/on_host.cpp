#include "cuda/on_host.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <utility>

#include "cpu/workspace.h"
#include "cuda/adam.h"
#include "cuda/critic_sequence.h"
#include "cuda/critic_step.h"
#include "cuda/flow_backward.h"
#include "cuda/flow_density.h"
#include "cuda/flow_record.h"
#include "cuda/meanflow_step.h"
#include "cuda/mlp_forward.h"
#include "cuda/monotonicity_gap.h"
#include "cuda/policy_act.h"
#include "cuda/q_gradient.h"
#include "cuda/reweighted_velocity.h"
#include "cuda/twin_q.h"
#include "partition.h"

namespace flame {
namespace {

using namespace flame::FLAME_ISA;

std::atomic<bool> falling_order{false};
std::atomic<size_t> shared_bytes{0};
std::atomic<bool> tensor_cores{false};

Launcher launcher_of(const HostDevice& device) {
    return {device.falling, device.shared_bytes / sizeof(float), device.multiprocessors};
}

// No operation of the table has cooperating blocks.
Launcher launcher() { return launcher_of({falling_order, shared_bytes, tensor_cores, 0}); }

// Workspace of one call; a value that no kernel wrote is NaN and shows in the results.
class HostMemory {
  public:
    explicit HostMemory(size_t bytes) : words_(bytes / sizeof(float) + kSlack, NAN) {}
    Carver carver() {
        const auto address = reinterpret_cast<uintptr_t>(words_.data());
        return Carver(reinterpret_cast<void*>(round_up(address, kAlignment)));
    }

  private:
    static constexpr size_t kAlignment = 256;
    static constexpr size_t kSlack = kAlignment / sizeof(float);
    std::vector<float> words_;
};

// Counts what operation(args, memory) takes, then runs it.
template <typename Carve, typename Run>
void with_memory(Carve&& carve, Run&& run) {
    Carver counter(nullptr);
    carve(counter);
    HostMemory memory(counter.used());
    Carver carver = memory.carver();
    run(carver);
}

template <typename Result, typename... Args>
Result missing(Args...) {
    throw std::runtime_error("this operation has no CUDA kernel");
}

void host_mlp_forward(const MlpForwardArgs& a) { mlp_forward(launcher(), a); }

void host_twin_q(const TwinQArgs& a) {
    with_memory([&](Carver& m) { carve_twin_q(a, m); },
                [&](Carver& m) { twin_q(launcher(), a, tensor_cores, m); });
}

void host_critic_step(const CriticStepArgs& a) {
    with_memory([&](Carver& m) { carve_critic_step(launcher(), a, m); },
                [&](Carver& m) { critic_step(launcher(), a, m); });
}

void host_q_gradient(const QGradientArgs& a) {
    with_memory([&](Carver& m) { carve_q_gradient(launcher(), a, m); },
                [&](Carver& m) { q_gradient(launcher(), a, m); });
}

void host_meanflow_step(const MeanFlowStepArgs& a) {
    with_memory([&](Carver& m) { carve_meanflow_step(launcher(), a, m); },
                [&](Carver& m) { meanflow_step(launcher(), a, m); });
}

void host_reweighted_velocity(const ReweightedArgs& a) {
    check(!a.pair, "the CUDA kernel of candidates does not evaluate pair encoders");
    CudaReweighted args{a, &a.alpha, &a.seed};
    args.reweighted.alpha = NAN;  // which is not to be read, nor is the seed
    args.reweighted.seed = ~a.seed;
    with_memory([&](Carver& m) { count_reweighted(a, m); },
                [&](Carver& m) { reweighted_velocity(launcher(), args, tensor_cores, m); });
}

void host_flow_density(const FlowDensityArgs& a) { flow_density(launcher(), a); }

struct HostFlow {
    FlowTape head;
    FlowDensityArgs args;
    void* record;
};

void host_flow_backward(const FlowBackwardArgs& deltas) {
    const HostFlow& flow = *reinterpret_cast<const HostFlow*>(deltas.tape);
    const FlowGradientArgs a{flow.args, flow.record, deltas};
    with_memory([&](Carver& m) { carve_flow_backward(launcher(), a, m); },
                [&](Carver& m) { flow_backward(launcher(), a, m); });
}

// Memory of a recorded pass, NaN as HostMemory.
float* undefined_floats(size_t count, Workspace& memory) {
    float* data = memory.floats(count);
    std::fill_n(data, count, NAN);
    return data;
}

const float* kept_floats(const float* data, size_t count, Workspace& memory) {
    return std::copy_n(data, count, memory.floats(count)) - count;
}

FlowTape* host_flow_record(const FlowDensityArgs& a, Workspace& memory) {
    auto* flow = static_cast<HostFlow*>(memory.bytes(sizeof(HostFlow)));
    const size_t parameters = parameter_count(a.spec);
    Carver counter(nullptr);
    carve_flow_record(a, counter);
    *flow = {{&host_flow_backward, a.states, a.action_dim, static_cast<int64_t>(parameters)},
             a,
             undefined_floats(counter.used() / sizeof(float), memory)};
    flow->args.parameters = kept_floats(a.parameters, parameters, memory);
    flow->args.scale = kept_floats(a.scale, 1, memory);
    Carver carver(flow->record);
    flow_record(launcher(), flow->args, carver);
    return &flow->head;
}

void host_truncated_normals(const TruncatedNormalArgs& a) {
    for (int64_t i = 0; i < a.count; ++i) {
        const TruncatedInterval t = truncated_interval(a.low[i], a.high[i]);
        a.output[i] = static_cast<float>(truncated_draw(t.log_upper, t.p_upper, t.ratio, t.lower,
                                                        t.upper, t.sign, a.uniform[i]));
    }
}

void host_adam(const AdamArgs& a) {
    AdamSchedule schedule{a.learning_rate, a.step - 1};
    adam(launcher(), a, &schedule);
}

void host_soft_update(const SoftUpdateArgs& a) { soft_update(launcher(), a); }

void host_monotonicity_gap(const MonotonicityArgs& a) { monotonicity_gap(launcher(), a); }

struct HostOperations {
    Launcher launch = launcher();

    size_t bytes(const TwinQArgs& a) const {
        Carver counter(nullptr);
        carve_twin_q(a, counter);
        return counter.used();
    }
    size_t bytes(const CriticStepArgs& a) const {
        Carver counter(nullptr);
        carve_critic_step(launch, a, counter);
        return counter.used();
    }
    void run(const MlpForwardArgs& a) const { mlp_forward(launch, a); }
    void run(const FlowDensityArgs& a) const { flow_density(launch, a); }
    void run(const TwinQArgs& a, void* workspace) const {
        Carver memory(workspace);
        twin_q(launch, a, false, memory);
    }
    void run(const CriticStepArgs& a, void* workspace) const {
        Carver memory(workspace);
        critic_step(launch, a, memory);
    }
    void run(const AdamArgs& a, AdamSchedule* schedule) const { adam(launch, a, schedule); }
    void run(const SoftUpdateArgs& a) const { soft_update(launch, a); }
};

CriticUpdatesResult host_critic_updates(const CriticUpdates& u) {
    AdamSchedule schedule{u.learning_rate, u.step - 1};
    const size_t outcomes = static_cast<size_t>(u.updates) * u.critics.members;
    std::vector<double> loss(outcomes);
    std::vector<double> q_mean(outcomes);
    const auto alpha = static_cast<double>(u.alpha);
    CudaCriticUpdates args{u,
                           u.policy->time.data(),
                           u.policy->scale.data(),
                           &schedule,
                           u.alpha != 0.0f ? &alpha : nullptr,
                           loss.data(),
                           q_mean.data()};
    args.updates.alpha = NAN;  // which is not to be read
    const HostOperations operations;
    const size_t bytes = critic_updates_bytes(operations, args);
    with_memory([&](Carver& m) { m.array<char>(bytes); },
                [&](Carver& m) { critic_updates(operations, args, m.array<char>(bytes)); });
    CriticUpdatesResult result{0.0, 0.0};
    for (size_t i = 0; i < outcomes; ++i) {
        result.loss += loss[i] / u.updates;
        result.q_mean += q_mean[i] / static_cast<double>(outcomes);
    }
    return result;
}

const CpuKernels kTable = {
    1,
    missing,
    missing,
    missing,
    host_mlp_forward,
    missing,
    host_twin_q,
    host_critic_step,
    host_q_gradient,
    host_meanflow_step,
    host_flow_density,
    host_flow_record,
    host_reweighted_velocity,
    host_truncated_normals,
    host_adam,
    host_soft_update,
    host_monotonicity_gap,
    host_critic_updates,
};

// One tile's product as a kernel.
template <int kRowsPerWarp, bool kTensorCores>
struct ProductKernel {
    static constexpr const char* kName = "product";
    const float* x;
    LayerView layer;
    int rows;
    TileLds lds;
    float* y;

    void operator()(const Block& block) const {
        auto tile = make_tile<kRowsPerWarp, kTensorCores>(block, lds);
        const int64_t first = block.index * tile.kRows;
        const int count = row_count(first, rows, tile.kRows);
        load_rows(block, tile, count, layer.in,
                  [&](int r, int c) { return x[(first + r) * layer.in + c]; });
        linear_from(block, tile, layer, layer.in, count, [](int, int) { return 0.0f; });
        block.each_thread([&](int t) {
            for (int e = t; e < count * layer.out; e += kThreads) {
                y[first * layer.out + e] = tile.x[e / layer.out * tile.ld + e % layer.out];
            }
        });
    }
};

}  // namespace

const CpuKernels* cuda_on_host(const HostDevice& device) {
    falling_order = device.falling;
    shared_bytes = device.shared_bytes;
    tensor_cores = device.tensor_cores;
    return &kTable;
}

void policy_act_on_host(const PolicyActArgs& a, const HostDevice& device) {
    const Launcher launch = launcher_of(device);
    with_memory([&](Carver& m) { count_policy_act(launch, a, m); },
                [&](Carver& m) { policy_act(launch, a, m); });
}

void product_on_host(const float* x, const float* w, int rows, int depth, int columns,
                     int rows_per_warp, const HostDevice& device, float* y) {
    const MlpSpec spec{1, 1, {depth, columns}, Activation::kRelu, false, false};
    const TileDemand want{rows, 1, 1, 0, 0, device.tensor_cores};
    const TilePlan plan = tile_plan(rows_per_warp, want, tile_lds(spec, want));
    with_tile(plan, [&](auto rows_of_warp, auto tensor) {
        using Kernel = ProductKernel<decltype(rows_of_warp)::value, decltype(tensor)::value>;
        const Kernel kernel{x, {w, nullptr, nullptr, nullptr, depth, columns}, rows, plan.lds, y};
        launcher_of(device)(kernel, plan.tiles, plan.shared);
    });
}

void mma_on_host(const float* a, const float* b, float* d) {
    PerLane<FragmentA> left;
    PerLane<FragmentB> right;
    PerLane<FragmentD> sum;
    for (int lane = 0; lane < kLanesPerWarp; ++lane) {
        std::copy_n(a + 4 * lane, 4, left[lane].v);
        std::copy_n(b + 2 * lane, 2, right[lane].v);
        std::copy_n(d + 4 * lane, 4, sum[lane].v);
    }
    mma(sum, left, right);
    for (int lane = 0; lane < kLanesPerWarp; ++lane) std::copy_n(sum[lane].v, 4, d + 4 * lane);
}

}  // namespace flame
