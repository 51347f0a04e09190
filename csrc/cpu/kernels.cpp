#include "cpu/kernels.h"

#include "cpu/machine_probe.h"
#include "cpu/policy_act_kernel.h"
#include "cpu/simd.h"
#include "cpu/training_kernels.h"
#include "monotonicity.h"

namespace flame::FLAME_ISA {

extern const CpuKernels kKernels;
const CpuKernels kKernels = {
    kLanes,
    policy_act,
    read_stream,
    multiply_add,
    mlp_forward,
    mlp_record,
    twin_q,
    critic_step,
    q_gradient,
    meanflow_step,
    flow_density,
    flow_record,
    reweighted_velocity,
    truncated_normals,
    adam,
    soft_update,
    monotonicity_gap,
    nullptr,
};

}  // namespace flame::FLAME_ISA
