// Concatenating an MLP's input blocks into padded rows, [action | observation | time features].
#pragma once

#include <cstring>

#include "cpu/gemm.h"
#include "cpu/workspace.h"

namespace flame::FLAME_ISA {

struct InputBlock {
    const float* data;
    int64_t ld;
    int columns;
};

// (rows, padded_columns(total)); padding is zero, because a weight gradient reads whole panels.
static inline float* concatenate(int64_t rows, const InputBlock* blocks, int count, int total,
                                 Workspace& workspace) {
    const int ld = padded_columns(total);
    float* to = workspace.floats(static_cast<size_t>(rows) * ld);
    for (int64_t i = 0; i < rows; ++i) {
        float* row = to + i * ld;
        int column = 0;
        for (int b = 0; b < count; ++b) {
            std::memcpy(row + column, blocks[b].data + i * blocks[b].ld,
                        blocks[b].columns * sizeof(float));
            column += blocks[b].columns;
        }
        std::memset(row + column, 0, (ld - column) * sizeof(float));
    }
    return to;
}

}  // namespace flame::FLAME_ISA
