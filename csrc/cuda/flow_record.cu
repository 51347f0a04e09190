#include "cuda/flow_record.h"

#include "cuda/training.h"

namespace flame {

void cuda_flow_record(const FlowDensityArgs& args, void* record, void* stream) {
    isa_cuda::Carver memory(record);
    isa_cuda::flow_record(isa_cuda::Launcher(stream), args, memory);
}

size_t cuda_workspace_bytes(const FlowDensityArgs& args) {
    isa_cuda::Carver memory(nullptr);
    isa_cuda::carve_flow_record(args, memory);
    return memory.used();
}

}  // namespace flame
