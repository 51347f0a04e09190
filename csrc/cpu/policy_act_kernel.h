#pragma once

#include "cpu/policy_act.h"

namespace flame::FLAME_ISA {

// Rows [begin, end) of the task; workspace: policy_act_workspace(task) floats, 64-byte aligned.
void policy_act(const ActTask& task, int64_t begin, int64_t end, float* workspace);

}  // namespace flame::FLAME_ISA
