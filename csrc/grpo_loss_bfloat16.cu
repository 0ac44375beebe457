#include "grpo_loss.cuh"

namespace grpo_fast {

template <>
cudaError_t grpo_loss_of<__nv_bfloat16>(const Rows& rows, const Layout& layout, const GrpoLoss& op, bool entropy_bonus,
                                        cudaStream_t stream) {
  if (rows.out == nullptr) return grpo_loss_alone<__nv_bfloat16>(rows, layout, op, stream);
  if (rows.out_dtype != rows.dtype) return cudaErrorInvalidValue;
  return grpo_loss_with_gradient<__nv_bfloat16, __nv_bfloat16>(rows, layout, op, entropy_bonus, stream);
}

}  // namespace grpo_fast
