// The only files with pybind11 are this and bindings_*.cpp: check, release the GIL, call.
#include "bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "api.h"
#include "check.h"
#include "cpu/kernels.h"
#include "cpu/machine_probe.h"
#include "cuda/device.h"
#include "partition.h"
#include "philox.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace flame {
namespace {

std::vector<std::string> isas(bool (*accept)(Isa)) {
    std::vector<std::string> names;
    for (int i = 0; i < kNumIsas; ++i) {
        if (accept(static_cast<Isa>(i))) names.emplace_back(isa_name(static_cast<Isa>(i)));
    }
    return names;
}

// Seconds of the best of a few bursts of work(thread), one for each of `threads`.
template <typename Work>
double best_burst(int threads, Work&& work) {
    constexpr int kBursts = 10;
    const WithoutGil without_gil;
    std::vector<float> sinks(static_cast<size_t>(threads));
    double best = std::numeric_limits<double>::infinity();
    for (int i = 0; i < kBursts; ++i) {
        const auto start = std::chrono::steady_clock::now();
        parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; ++t) sinks[t] = work(t);
        });
        const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
        best = std::min(best, elapsed.count());
    }
    volatile float sink = sinks[0];
    (void)sink;
    return best;
}

// Multiply-adds in registers on all threads, GFLOP/s.
double peak_gflops() {
    constexpr int64_t kRounds = 1 << 20;
    const int threads = num_threads();
    const auto& k = kernels();
    const double seconds = best_burst(threads, [&](int64_t) { return k.multiply_add(kRounds); });
    return 2e-9 * static_cast<double>(kRounds) * kProbeChains * k.vector_floats * threads / seconds;
}

// Reading a buffer of `size` bytes again and again, each thread its share, GB/s: what the caches
// (or the memory) that hold so much deliver.
double read_gbps(int64_t size) {
    constexpr int64_t kFloats = 128;  // read_stream takes multiples of it
    check(size >= 1, "size is ", size, "; it must be at least 1");
    const int threads = num_threads();
    const int64_t share =
        round_up(divide_up(size, threads * static_cast<int64_t>(sizeof(float))), kFloats);
    const int64_t share_bytes = share * static_cast<int64_t>(sizeof(float));
    const int64_t repeats = divide_up(int64_t{1} << 24, share_bytes);
    const std::vector<float> data(static_cast<size_t>(share * threads), 1.0f);
    const auto& k = kernels();
    const double seconds = best_burst(threads, [&](int64_t thread) {
        float total = 0.0f;
        for (int64_t r = 0; r < repeats; ++r) {
            total += k.read_stream(data.data() + thread * share, share);
        }
        return total;
    });
    return 1e-9 * static_cast<double>(repeats * share_bytes * threads) / seconds;
}

py::dict build_info() {
    py::dict info;
    info["version"] = FLAME_VERSION;
    info["compiler"] = FLAME_COMPILER;
    info["build_type"] = FLAME_BUILD_TYPE;
    info["sanitize"] = FLAME_SANITIZE;
#if defined(FLAME_HAVE_CUDA)
    info["cuda_archs"] = FLAME_CUDA_ARCHS;
    info["cuda_toolkit"] = FLAME_CUDA_TOOLKIT;
#else
    info["cuda_archs"] = "";
    info["cuda_toolkit"] = "";
#endif
    return info;
}

std::vector<std::string> cuda_devices() {
    std::vector<std::string> devices;
#if defined(FLAME_HAVE_CUDA)
    for (int i = 0; i < cuda_device_count(); ++i) {
        char name[256];
        int major = 0;
        int minor = 0;
        cuda_device_name(i, name, sizeof(name), &major, &minor);
        devices.push_back(concat(name, " (sm_", major, minor, ")"));
    }
#endif
    return devices;
}

std::string cuda_problem() {
    std::string problem;
#if defined(FLAME_HAVE_CUDA)
    cuda_device_count(&problem);
#endif
    return problem;
}

// --- Random numbers

using Words = py::array_t<uint32_t, py::array::c_style | py::array::forcecast>;

py::array_t<uint32_t> philox4x32(const Words& counter, const Words& key) {
    check(counter.ndim() == 2 && counter.shape(1) == 4 && key.ndim() == 2 && key.shape(1) == 2 &&
              key.shape(0) == counter.shape(0),
          "philox4x32 needs counters (n, 4) and as many keys (n, 2)");
    py::array_t<uint32_t> out({counter.shape(0), py::ssize_t{4}});
    auto words = out.mutable_unchecked<2>();
    const auto c = counter.unchecked<2>();
    const auto k = key.unchecked<2>();
    for (py::ssize_t i = 0; i < counter.shape(0); ++i) {
        const PhiloxBlock block =
            philox4x32_10({{c(i, 0), c(i, 1), c(i, 2), c(i, 3)}}, k(i, 0), k(i, 1));
        for (int j = 0; j < 4; ++j) words(i, j) = block.v[j];
    }
    return out;
}

void check_draws(int64_t n) { check(n >= 0, "n is ", n, "; it must not be negative"); }

py::array_t<uint32_t> philox_bits(uint64_t seed, uint64_t stream, uint64_t offset, int64_t n) {
    check_draws(n);
    py::array_t<uint32_t> out(n);
    uint32_t* data = out.mutable_data();
    for (int64_t i = 0; i < n; ++i) {
        data[i] = philox_block(seed, stream, offset + static_cast<uint64_t>(i) / 4).v[i % 4];
    }
    return out;
}

py::array_t<float> philox_uniform(uint64_t seed, uint64_t stream, uint64_t offset, int64_t n) {
    const py::array_t<uint32_t> bits = philox_bits(seed, stream, offset, n);
    py::array_t<float> out(n);
    for (int64_t i = 0; i < n; ++i) out.mutable_data()[i] = uniform_from_bits(bits.data()[i]);
    return out;
}

py::array_t<float> philox_normal(uint64_t seed, uint64_t stream, uint64_t offset, int64_t n) {
    check_draws(n);
    py::array_t<float> out(n);
    fill_normal(seed, stream, offset, 0, static_cast<uint64_t>(n), out.mutable_data());
    return out;
}

#if defined(FLAME_HAVE_CUDA)
// Device pointers and streams cross as integers: no dependency on any tensor library.
template <typename Out, void (*fill)(const PhiloxKey&, int64_t, Out*, void*)>
void cuda_fill(uint64_t seed, uint64_t stream, uint64_t offset, int64_t n, uintptr_t out,
               uintptr_t cuda_stream) {
    check_draws(n);
    check(out != 0 || n == 0, "the output pointer is null");
    const WithoutGil without_gil;
    fill({seed, stream, offset}, n, reinterpret_cast<Out*>(out),
         reinterpret_cast<void*>(cuda_stream));
}
#endif

}  // namespace
}  // namespace flame

PYBIND11_MODULE(_core, m) {
    using namespace flame;
    m.doc() = "Native kernels of flame_ext; use them through the package's Python functions.";

    m.def("build_info", &build_info);
    m.def("isa_compiled", [] { return isas(&isa_compiled); });
    m.def("isa_supported", [] { return isas(&isa_supported); });
    m.def("isa_active", [] { return isa_name(isa_active()); });
    m.def("bfloat16_supported", &bfloat16_supported);
    // By a string: pybind11 makes a null pointer of None where one is asked for.
    m.def("set_isa", [](const std::string& name) { set_isa(name.c_str()); }, py::arg("name"));
    m.def("num_threads", &num_threads);
    m.def("set_num_threads", &set_num_threads, py::arg("n"));
    m.def("peak_gflops", &peak_gflops);
    m.def("read_gbps", &read_gbps, py::arg("size"));
    m.def("cuda_devices", &cuda_devices);
    m.def("cuda_problem", &cuda_problem);

    m.def("philox4x32", &philox4x32, py::arg("counter"), py::arg("key"));
    m.def("philox_bits", &philox_bits, py::arg("seed"), py::arg("stream"), py::arg("offset"),
          py::arg("n"));
    m.def("philox_uniform", &philox_uniform, py::arg("seed"), py::arg("stream"), py::arg("offset"),
          py::arg("n"));
    m.def("philox_normal", &philox_normal, py::arg("seed"), py::arg("stream"), py::arg("offset"),
          py::arg("n"));
#if defined(FLAME_HAVE_CUDA)
    m.def("cuda_philox_bits", &cuda_fill<uint32_t, &cuda_philox_bits>, py::arg("seed"),
          py::arg("stream"), py::arg("offset"), py::arg("n"), py::arg("out"),
          py::arg("cuda_stream"));
    m.def("cuda_philox_normal", &cuda_fill<float, &cuda_philox_normal>, py::arg("seed"),
          py::arg("stream"), py::arg("offset"), py::arg("n"), py::arg("out"),
          py::arg("cuda_stream"));
#endif

    bind_policy(m);
    bind_training(m);
    bind_flow(m);
    bind_policy_loss(m);
    bind_critic_updates(m);
    bind_embeddings(m);
    bind_cuda(m);
    bind_on_host(m);
}
