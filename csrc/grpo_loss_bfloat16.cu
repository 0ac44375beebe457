#include "grpo_loss.cuh"

namespace grpo_fast {

GRPO_FAST_LOSS_OF(__nv_bfloat16);

}  // namespace grpo_fast
