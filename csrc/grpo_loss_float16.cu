#include "grpo_loss.cuh"

namespace grpo_fast {

GRPO_FAST_LOSS_OF(__half);

}  // namespace grpo_fast
