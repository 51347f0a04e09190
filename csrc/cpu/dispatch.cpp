// Which instruction set runs: detection by cpuid, choice by FLAME_EXT_ISA or set_isa(). The table
// of bfloat16 products stands beside that of AVX-512 and is a network's choice.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "api.h"
#include "check.h"
#include "cpu/kernels.h"

namespace flame {

namespace isa_generic {
extern const CpuKernels kKernels;
}
#if defined(FLAME_HAVE_AVX2)
namespace isa_avx2 {
extern const CpuKernels kKernels;
}
#endif
#if defined(FLAME_HAVE_AVX512)
namespace isa_avx512 {
extern const CpuKernels kKernels;
}
#endif

#if defined(FLAME_HAVE_AVX512_BF16)
namespace isa_avx512_bf16 {
extern const CpuKernels kKernels;
}
#endif

namespace {

constexpr const char* kNames[kNumIsas] = {"generic", "avx2", "avx512"};

const CpuKernels* table(Isa isa) {
    switch (isa) {
        case Isa::kGeneric:
            return &isa_generic::kKernels;
        case Isa::kAvx2:
#if defined(FLAME_HAVE_AVX2)
            return &isa_avx2::kKernels;
#else
            return nullptr;
#endif
        case Isa::kAvx512:
#if defined(FLAME_HAVE_AVX512)
            return &isa_avx512::kKernels;
#else
            return nullptr;
#endif
    }
    return nullptr;
}

// __builtin_cpu_supports also asks the operating system (xgetbv) whether it saves the registers.
bool cpu_has(Isa isa) {
#if defined(__x86_64__)
    switch (isa) {
        case Isa::kGeneric:
            return true;
        case Isa::kAvx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                   __builtin_cpu_supports("f16c");
        case Isa::kAvx512:
            return cpu_has(Isa::kAvx2) && __builtin_cpu_supports("avx512f") &&
                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl");
    }
#endif
    return isa == Isa::kGeneric;
}

std::string supported_list() {
    std::string list;
    for (int i = 0; i < kNumIsas; ++i) {
        if (!isa_supported(static_cast<Isa>(i))) continue;
        list += list.empty() ? kNames[i] : std::string(", ") + kNames[i];
    }
    return list;
}

Isa parse(const char* name, const char* source) {
    for (int i = 0; i < kNumIsas; ++i) {
        if (std::strcmp(name, kNames[i]) != 0) continue;
        const Isa isa = static_cast<Isa>(i);
        check(isa_supported(isa), source, " is '", name, "', which this ",
              isa_compiled(isa) ? "machine's CPU cannot run" : "build does not contain",
              "; choose one of: ", supported_list());
        return isa;
    }
    check(false, source, " is '", name,
          "', which is not an instruction set; choose one of: ", supported_list());
    return Isa::kGeneric;
}

Isa best() {
    for (int i = kNumIsas - 1; i > 0; --i) {
        if (isa_supported(static_cast<Isa>(i))) return static_cast<Isa>(i);
    }
    return Isa::kGeneric;
}

std::atomic<const CpuKernels*> active_table{nullptr};
std::atomic<Isa> active_isa{Isa::kGeneric};

void activate(Isa isa) {
    active_isa.store(isa);
    active_table.store(table(isa), std::memory_order_release);
}

void choose_once() {
    if (active_table.load(std::memory_order_acquire) != nullptr) return;
    const char* name = std::getenv("FLAME_EXT_ISA");
    activate(name != nullptr && *name != '\0' ? parse(name, "FLAME_EXT_ISA") : best());
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_compiled(Isa isa) { return table(isa) != nullptr; }

bool isa_supported(Isa isa) { return isa_compiled(isa) && cpu_has(isa); }

Isa isa_active() {
    choose_once();
    return active_isa.load();
}

void set_isa(const char* name) { activate(parse(name, "the instruction set")); }

bool bfloat16_supported() {
#if defined(FLAME_HAVE_AVX512_BF16)
    return isa_active() == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

const CpuKernels& kernels() {
    choose_once();
    return *active_table.load(std::memory_order_acquire);
}

const CpuKernels& kernels(const MlpSpec& spec) {
#if defined(FLAME_HAVE_AVX512_BF16)
    if (spec.bfloat16) return isa_avx512_bf16::kKernels;
#endif
    (void)spec;
    return kernels();
}

void replace_kernels(const CpuKernels* replacement) {
    const Isa isa = isa_active();  // chosen now if it was not: the replacement hides that
    active_table.store(replacement != nullptr ? replacement : table(isa),
                       std::memory_order_release);
}

}  // namespace flame
