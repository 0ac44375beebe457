#include "grpo_loss.cuh"

namespace grpo_fast {

GRPO_FAST_LOSS_OF(float);

}  // namespace grpo_fast
