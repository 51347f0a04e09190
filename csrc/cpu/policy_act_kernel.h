#pragma once

#include "cpu/policy_act.h"

namespace flame::FLAME_ISA {

// Rows [begin, end) of the task; workspace: policy_act_workspace(task) floats, 64-byte aligned.
void policy_act(const ActTask& task, int64_t begin, int64_t end, float* workspace);

// Sum of `floats` floats (a multiple of 128), read once in order: the floor of a memory-bound
// kernel.
float read_stream(const float* data, int64_t floats);

}  // namespace flame::FLAME_ISA
