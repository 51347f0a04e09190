// The dispatch table: one CpuKernels per instruction set, filled in kernels.cpp, which like every
// source in FLAME_ISA_SOURCES (CMakeLists.txt) is compiled once per set inside namespace FLAME_ISA.
//
// To add a kernel:
//   1. declare its argument struct (plain data, raw pointers) in cpu/training.h;
//   2. write `void adam(const AdamArgs&)` in namespace flame::FLAME_ISA in cpu/adam.cpp, using
//      cpu/simd.h and no STL, add the file to FLAME_ISA_SOURCES;
//   3. add a function pointer below and its name to the list in kernels.cpp;
//   4. in ordinary code, with arguments that the bindings checked, call
//   flame::kernels().adam(args), or kernels(spec) where a network is multiplied.
#pragma once

#include "cpu/policy_act.h"
#include "cpu/training.h"

namespace flame {

class Workspace;
struct MonotonicityArgs;
// critic_updates.h, which the sources of an instruction set cannot include: it has STL.
struct CriticUpdates;
struct CriticUpdatesResult;

struct CpuKernels {
    int vector_floats;  // lanes of simd.h's vector, for reports
    void (*policy_act)(const ActTask& task, int64_t begin, int64_t end, float* workspace);
    float (*read_stream)(const float* data, int64_t floats);
    float (*multiply_add)(int64_t rounds);
    void (*mlp_forward)(const MlpForwardArgs& args);
    MlpTape* (*mlp_record)(const MlpRecordArgs& args, Workspace& memory);
    void (*twin_q)(const TwinQArgs& args);
    void (*critic_step)(const CriticStepArgs& args);
    void (*q_gradient)(const QGradientArgs& args);
    void (*meanflow_step)(const MeanFlowStepArgs& args);
    void (*flow_density)(const FlowDensityArgs& args);
    FlowTape* (*flow_record)(const FlowDensityArgs& args, Workspace& memory);
    void (*reweighted_velocity)(const ReweightedArgs& args);
    void (*truncated_normals)(const TruncatedNormalArgs& args);
    void (*adam)(const AdamArgs& args);
    void (*soft_update)(const SoftUpdateArgs& args);
    void (*monotonicity_gap)(const MonotonicityArgs& args);
    // The whole sequence, where it is not taken step by step (of a flow's critics alone); or null.
    CriticUpdatesResult (*critic_updates)(const CriticUpdates& args);
};

// The table of isa_active(), or the one given to replace_kernels.
const CpuKernels& kernels();
// That for this network's products.
const CpuKernels& kernels(const MlpSpec& spec);
// For tests: another table until the next set_isa, or null for that of isa_active() again.
void replace_kernels(const CpuKernels* table);

}  // namespace flame
