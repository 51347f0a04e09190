#include "cpu/kernels.h"

#include "cpu/simd.h"

namespace flame::FLAME_ISA {

extern const CpuKernels kKernels;
const CpuKernels kKernels = {
    kLanes,
};

}  // namespace flame::FLAME_ISA
