// Entry points of the training kernels for one instruction set; kernels.cpp puts them in the table.
#pragma once

#include "cpu/simd.h"
#include "cpu/training.h"
#include "cpu/workspace.h"

namespace flame::FLAME_ISA {

void mlp_forward(const MlpForwardArgs& args);
MlpTape* mlp_record(const MlpRecordArgs& args, Workspace& memory);
void twin_q(const TwinQArgs& args);
void critic_step(const CriticStepArgs& args);
void q_gradient(const QGradientArgs& args);
void meanflow_step(const MeanFlowStepArgs& args);
void flow_density(const FlowDensityArgs& args);
FlowTape* flow_record(const FlowDensityArgs& args, Workspace& memory);
void reweighted_velocity(const ReweightedArgs& args);
void truncated_normals(const TruncatedNormalArgs& args);
void adam(const AdamArgs& args);
void soft_update(const SoftUpdateArgs& args);

}  // namespace flame::FLAME_ISA
