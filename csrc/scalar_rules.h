// Rules of single numbers that the kernels of CPU and CUDA share.
#pragma once

#include "float_bits.h"

namespace flame {

constexpr double kHalfLog2Pi = 0.91893853320467274178;

// Whether q becomes the minimum over critics. A NaN of any of them must show: it neither compares
// less nor is it replaced.
FLAME_HD bool takes_minimum(float q, float least) { return q < least || q != q; }

// A flow's action as the environment takes it; NaN stays, as in torch.clamp.
FLAME_HD float into_box(float action) {
    return action < -1.0f ? -1.0f : (action > 1.0f ? 1.0f : action);
}

// What critics regress on; entropy is -alpha log pi, or 0.
FLAME_HD float td_target(float reward, float discount, float q_min, float entropy) {
    return reward + discount * (q_min + entropy);
}

}  // namespace flame
