// The native surface: plain structs and raw pointers, no Python, no torch. bindings*.cpp check the
// arguments, release the GIL and call these.
//
// Conventions for everything below and for the files that extend it:
//   * a matrix is row-major float32; `ld` is the distance between rows in floats, columns are
//     dense;
//   * the caller owns every pointer; const pointers are only read; no pointer is kept after the
//     call unless the name says so;
//   * sizes are int64_t where they count rows, int32_t where they count columns or layers;
//   * arguments are checked in the bindings (check.h), everything below assumes them checked;
//   * results do not depend on the number of threads.
#pragma once

#include <stdint.h>

namespace flame {

// --- Instruction sets (cpu/dispatch.cpp)

enum class Isa : int32_t { kGeneric = 0, kAvx2 = 1, kAvx512 = 2 };
constexpr int kNumIsas = 3;

const char* isa_name(Isa isa);
bool isa_compiled(Isa isa);
// Compiled in, and this machine's CPU and operating system can run it.
bool isa_supported(Isa isa);
// The best supported one, unless FLAME_EXT_ISA or set_isa chose; throws when that choice is
// invalid.
Isa isa_active();
// Whether networks may ask for bfloat16 products (mlp_spec.h): AVX-512 is active, and the processor
// multiplies bfloat16.
bool bfloat16_supported();
// "generic", "avx2" or "avx512"; throws std::invalid_argument for others and unsupported ones.
void set_isa(const char* name);

// --- Networks

enum class Activation : int32_t { kRelu = 0, kSilu = 1, kMish = 2 };

// --- Random numbers (philox.h says how draws are numbered)

struct PhiloxKey {
    uint64_t seed;
    uint64_t stream;
    uint64_t offset;  // in blocks of four draws
};

}  // namespace flame
