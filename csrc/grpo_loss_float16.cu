#include "grpo_loss.cuh"

namespace grpo_fast {

template <>
cudaError_t grpo_loss_of<__half>(const Rows& rows, const Layout& layout, const GrpoLoss& op, bool entropy_bonus,
                                 cudaStream_t stream) {
  if (rows.out == nullptr) return grpo_loss_alone<__half>(rows, layout, op, stream);
  if (rows.out_dtype != rows.dtype) return cudaErrorInvalidValue;
  return grpo_loss_with_gradient<__half, __half>(rows, layout, op, entropy_bonus, stream);
}

}  // namespace grpo_fast
