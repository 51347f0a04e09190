// What shared formulas run on: vectors where the build compiles for one of the CPU's instruction
// sets (it defines FLAME_ISA), single values in CUDA kernels. Both give the same names.
#pragma once

#if defined(FLAME_ISA) && !defined(FLAME_SCALAR)
#include "cpu/simd_double.h"
#else
#include "cuda/scalar.h"
#endif
