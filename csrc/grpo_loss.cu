#include "grpo_loss.cuh"

namespace grpo_fast {

int chunk_bytes(const Layout& layout) { return bytes_of_chunk(layout); }

int shared_bytes(const Layout& layout) { return bytes_of_block(layout); }

cudaError_t grpo_loss_rows(const Rows& rows, const Layout& layout, const LossOptions& options, const Plan& plan,
                           const TokenInputs& inputs, bool entropy_bonus, const RowResults& results,
                           cudaStream_t stream) {
  const GrpoLoss op = {options, plan, inputs, results};
  switch (rows.dtype) {
    case DType::kFloat32:
      return grpo_loss_of<float>(rows, layout, op, entropy_bonus, stream);
    case DType::kBFloat16:
      return grpo_loss_of<__nv_bfloat16>(rows, layout, op, entropy_bonus, stream);
    case DType::kFloat16:
      return grpo_loss_of<__half>(rows, layout, op, entropy_bonus, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace grpo_fast
