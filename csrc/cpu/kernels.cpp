#include "cpu/kernels.h"

#include "cpu/policy_act_kernel.h"
#include "cpu/simd.h"

namespace flame::FLAME_ISA {

extern const CpuKernels kKernels;
const CpuKernels kKernels = {
    kLanes,
    policy_act,
};

}  // namespace flame::FLAME_ISA
