#include "grpo_loss.cuh"

namespace grpo_fast {

template <>
cudaError_t grpo_loss_of<float>(const Rows& rows, const Layout& layout, const GrpoLoss& op, bool entropy_bonus,
                                cudaStream_t stream) {
  if (rows.out == nullptr) return grpo_loss_alone<float>(rows, layout, op, stream);
  switch (rows.out_dtype) {
    case DType::kFloat32:
      return grpo_loss_with_gradient<float, float>(rows, layout, op, entropy_bonus, stream);
    case DType::kBFloat16:
      return grpo_loss_with_gradient<float, __nv_bfloat16>(rows, layout, op, entropy_bonus, stream);
    case DType::kFloat16:
      return grpo_loss_with_gradient<float, __half>(rows, layout, op, entropy_bonus, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace grpo_fast
