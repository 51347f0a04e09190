#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "check.h"

namespace flame {
namespace {

constexpr int kMaxThreads = 256;
// Threads poll this often before they offer their CPU to others: 10-30 us.
constexpr int kSpins = 2000;
constexpr int kYields = 20;
// An idle worker polls on, yielding each time, through the gaps between the kernels of a training
// step: to wake a sleeping one takes about as long as a small kernel.
constexpr int kIdleYields = 1000;
// Chunks differ in cost and threads in speed, so there are more of them than threads.
constexpr int kChunksPerThread = 16;

inline void cpu_pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// A variable's number of threads; 0 where it is not set (null) or gives none.
int threads_in(const char* text) {
    if (text == nullptr) return 0;
    char* end = nullptr;
    const long value = std::strtol(text, &end, 10);
    return end != text && value >= 1 && value <= kMaxThreads ? static_cast<int>(value) : 0;
}

// FLAME_EXT_NUM_THREADS, else OMP_NUM_THREADS (as torch and BLAS), else the CPUs we may run on.
int default_threads() {
    const char* own = std::getenv("FLAME_EXT_NUM_THREADS");
    if (own != nullptr && *own != '\0') {
        const int n = threads_in(own);
        check(n > 0, "FLAME_EXT_NUM_THREADS='", own, "' is not a number of threads from 1 to ",
              kMaxThreads);
        return n;
    }
    // Others read it too, in more forms than ours: what we cannot take is no error.
    if (const int n = threads_in(std::getenv("OMP_NUM_THREADS"))) return n;
    int n = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) == 0) n = CPU_COUNT(&set);
#endif
    return std::clamp(n, 1, kMaxThreads);
}

// The calling thread's rounding and whether it flushes denormals to zero.
uint64_t float_mode() {
#if defined(__x86_64__)
    return _mm_getcsr();
#elif defined(__aarch64__)
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
#else
    return 0;
#endif
}

void set_float_mode([[maybe_unused]] uint64_t mode) {
#if defined(__x86_64__)
    _mm_setcsr(static_cast<unsigned>(mode));
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" ::"r"(mode));
#endif
}

struct Job {
    ChunkFn fn = nullptr;
    void* context = nullptr;
    int64_t n = 0;
    uint32_t chunks = 0;
    // Of the caller; otherwise bits would depend on which thread takes a chunk.
    uint64_t mode = 0;

    void run(uint32_t chunk) const {
        const int64_t begin = n * chunk / chunks;
        const int64_t end = n * (chunk + 1) / chunks;
        if (begin < end) fn(context, begin, end);
    }
};

// Every thread, the caller included, takes the chunks of its own share first and then those that
// others have not begun. So the same thread sees the same rows and parameters in kernel after
// kernel, and they stay in its caches. On a machine with other work a worker may not get a CPU for
// milliseconds; then the caller has done its part too, instead of waiting for it.
class Pool {
  public:
    explicit Pool(int workers) : shares_(static_cast<size_t>(workers) + 1) {
        threads_.reserve(static_cast<size_t>(workers));
        try {
            for (int i = 0; i < workers; ++i) {
                threads_.emplace_back([this, i] { work(static_cast<uint32_t>(i) + 1); });
            }
        } catch (const std::system_error& error) {
            stop();
            throw std::runtime_error(concat("only ", threads_.size() + 1, " of ", workers + 1,
                                            " threads can be started (", error.what(),
                                            "); set FLAME_EXT_NUM_THREADS to fewer"));
        }
    }

    ~Pool() { stop(); }

    int workers() const { return static_cast<int>(threads_.size()); }

    void run(const Job& job) {
        uint32_t generation;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job_ = job;
            error_ = nullptr;
            finished_.store(0, std::memory_order_relaxed);
            generation = generation_.load(std::memory_order_relaxed) + 1;
            for (uint32_t i = 0; i < shares_.size(); ++i) {
                shares_[i].next.store(ticket(generation, share_begin(job, i)),
                                      std::memory_order_release);
            }
            generation_.store(generation, std::memory_order_release);
        }
        wake_.notify_all();
        take_chunks(job, generation, 0);
        for (int i = 0; finished_.load(std::memory_order_acquire) != job.chunks; ++i) wait(i);
        if (error_) std::rethrow_exception(error_);
    }

  private:
    void stop() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_.store(true);
        }
        wake_.notify_all();
        for (auto& thread : threads_) thread.join();
    }

    static uint64_t ticket(uint32_t generation, uint32_t chunk) {
        return static_cast<uint64_t>(generation) << 32 | chunk;
    }

    uint32_t share_begin(const Job& job, uint32_t share) const {
        return static_cast<uint32_t>(uint64_t{job.chunks} * share / shares_.size());
    }

    // Runs chunks until none is left or, for a worker that comes late, another job has begun.
    void take_chunks(const Job& job, uint32_t generation, uint32_t own) {
        const auto shares = static_cast<uint32_t>(shares_.size());
        for (uint32_t i = 0; i < shares; ++i) {
            const uint32_t share = (own + i) % shares;
            take_share(job, generation, shares_[share].next, share_begin(job, share + 1));
        }
    }

    void take_share(const Job& job, uint32_t generation, std::atomic<uint64_t>& next,
                    uint32_t end) {
        uint64_t chunk = next.load(std::memory_order_acquire);
        while (chunk < ticket(generation, end) && chunk >= ticket(generation, 0)) {
            if (!next.compare_exchange_weak(chunk, chunk + 1, std::memory_order_acq_rel)) continue;
            run_chunk(job, static_cast<uint32_t>(chunk));
            finished_.fetch_add(1, std::memory_order_release);
            chunk = next.load(std::memory_order_acquire);
        }
    }

    // A chunk in progress usually ends soon; if its thread lost the CPU, it may need ours.
    static void wait(int attempt) {
        if (attempt < kSpins) {
            cpu_pause();
        } else if (attempt < kSpins + kYields) {
            std::this_thread::yield();
        } else {
            std::this_thread::sleep_for(std::chrono::microseconds(50));
        }
    }

    void run_chunk(const Job& job, uint32_t chunk) {
        try {
            job.run(chunk);
        } catch (...) {
            std::lock_guard<std::mutex> lock(mutex_);
            if (!error_) error_ = std::current_exception();
        }
    }

    void work(uint32_t own);

    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> threads_;
    Job job_;
    std::exception_ptr error_;
    std::atomic<uint32_t> generation_{0};
    // Of each thread: the ticket of its next chunk, on a cache line of its own.
    struct alignas(64) Share {
        std::atomic<uint64_t> next{0};
    };
    std::vector<Share> shares_;
    std::atomic<uint32_t> finished_{0};
    std::atomic<bool> stop_{false};
};

thread_local bool inside_pool = false;

void Pool::work(uint32_t own) {
    inside_pool = true;
    uint32_t seen = 0;
    for (;;) {
        const auto idle = [&] { return generation_.load(std::memory_order_acquire) == seen; };
        for (int i = 0; i < kSpins && idle(); ++i) cpu_pause();
        for (int i = 0; i < kIdleYields && idle() && !stop_; ++i) std::this_thread::yield();
        Job job;
        {
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return stop_ || generation_.load() != seen; });
            if (stop_) return;
            seen = generation_.load();
            job = job_;
        }
        set_float_mode(job.mode);
        take_chunks(job, seen, own);
    }
}

struct State {
    std::mutex use;
    std::unique_ptr<Pool> pool;
};

// Never destroyed: at exit workers may still wait, and the process takes them along. After fork the
// child holds no worker threads, so it starts from a fresh state and leaks the parent's.
std::atomic<State*> state{nullptr};
std::atomic<int> wanted{0};

void start_afresh() {
    state.store(new State);
    inside_pool = false;
}

// When the module is loaded, before any thread computes: a fork during the first use would leave
// the child waiting for its end.
const bool installed = [] {
    start_afresh();
    return pthread_atfork(nullptr, nullptr, start_afresh) == 0;
}();

}  // namespace

int num_threads() {
    int n = wanted.load();
    if (n == 0) {
        int expected = 0;
        wanted.compare_exchange_strong(expected, default_threads());
        n = wanted.load();
    }
    return n;
}

void set_num_threads(int n) {
    check(n >= 1 && n <= kMaxThreads, "the number of threads is ", n, "; it must be from 1 to ",
          kMaxThreads);
    wanted.store(n);
}

void parallel_for_raw(int64_t n, int64_t grain, ChunkFn fn, void* context) {
    if (n <= 0) return;
    const int threads = num_threads();
    const int64_t most = threads == 1 ? 1 : static_cast<int64_t>(threads) * kChunksPerThread;
    const int64_t chunks =
        std::min<int64_t>(most, std::max<int64_t>(1, n / std::max<int64_t>(grain, 1)));
    if (chunks == 1 || inside_pool) return fn(context, 0, n);
    State& s = *state.load();
    std::unique_lock<std::mutex> lock(s.use, std::try_to_lock);
    if (!lock.owns_lock()) return fn(context, 0, n);
    if (!s.pool || s.pool->workers() != threads - 1) {
        s.pool.reset();
        s.pool = std::make_unique<Pool>(threads - 1);
    }
    struct Nested {
        Nested() { inside_pool = true; }
        ~Nested() { inside_pool = false; }
    } nested;
    s.pool->run({fn, context, n, static_cast<uint32_t>(chunks), float_mode()});
}

}  // namespace flame
