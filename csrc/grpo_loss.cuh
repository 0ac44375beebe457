// The GRPO loss over logits: what becomes of a row's softmax.

#pragma once

#include "resident.cuh"
#include "scalars.cuh"
#include "token_loss.cuh"

namespace grpo_fast {

struct GrpoLoss {
  LossOptions options;
  Plan plan;
  TokenInputs tokens;
  RowResults results;

  struct Inputs {
    float weight, advantage, sampler_ratio, old_logp, ref_logp, threshold, d_entropy;
    bool chosen;
  };

  struct Result {
    float d_logp, d_entropy;
    TokenLoss token;
    float weight;
  };

  __device__ Inputs load(int n) const {
    return {plan.weights[n],
            plan.advantages[n],
            plan.sampler_ratio == nullptr ? 1.0f : plan.sampler_ratio[n],
            load_or(tokens.old_logps, n, 0.0f),
            load_or(tokens.ref_logps, n, 0.0f),
            load_or(tokens.entropy_threshold, 0, -INFINITY),
            *plan.d_entropy,
            keeps(tokens.entropy_mask, n)};
  }

  __device__ Result evaluate(const Inputs& in, const Softmax& row) const {
    const float old_logp = tokens.old_logps.data == nullptr ? row.logp : in.old_logp;
    const bool chosen = in.chosen && (tokens.entropy_threshold.data == nullptr || row.entropy >= in.threshold);
    Result result;
    result.token = token_loss(row.logp, old_logp, in.ref_logp, in.advantage, in.sampler_ratio, chosen, options);
    result.weight = in.weight;
    result.d_logp = row.sampled ? result.token.d_logp * in.weight : 0.0f;
    result.d_entropy = chosen ? in.d_entropy : 0.0f;
    return result;
  }

  __device__ void store(int n, const Softmax& row, const Result& result) const {
    results.logps[n] = row.logp;
    results.entropies[n] = row.entropy;
    results.losses[n] = result.token.loss * result.weight;
    results.ratios[n] = result.token.ratio;
    results.clips[n] = result.token.clip;
    if (results.kls != nullptr) results.kls[n] = result.token.kl;
  }

  __device__ void skip(int n) const { results.logps[n] = results.entropies[n] = 0.0f; }
};

template <typename In, typename Out>
cudaError_t grpo_loss_with_gradient(const Rows& rows, const Layout& layout, const GrpoLoss& op, bool entropy_bonus,
                                    cudaStream_t stream) {
  if (rows.options.has_softcap) {
    return entropy_bonus ? launch_resident<In, Out, true, true, true>(rows, op, layout, stream)
                         : launch_resident<In, Out, true, true, false>(rows, op, layout, stream);
  }
  return entropy_bonus ? launch_resident<In, Out, false, true, true>(rows, op, layout, stream)
                       : launch_resident<In, Out, false, true, false>(rows, op, layout, stream);
}

// Instantiated in grpo_loss_*.cu, a dtype of the logits each, which compile side by side.
template <typename In>
cudaError_t grpo_loss_of(const Rows& rows, const Layout& layout, const GrpoLoss& op, bool entropy_bonus,
                         cudaStream_t stream) {
  if (rows.out == nullptr) {
    return rows.options.has_softcap ? launch_resident<In, In, true, false, false>(rows, op, layout, stream)
                                    : launch_resident<In, In, false, false, false>(rows, op, layout, stream);
  }
  if (rows.out_dtype == rows.dtype) {
    return grpo_loss_with_gradient<In, In>(rows, layout, op, entropy_bonus, stream);
  }
  if constexpr (std::is_same_v<In, float>) {
    switch (rows.out_dtype) {
      case DType::kBFloat16:
        return grpo_loss_with_gradient<In, __nv_bfloat16>(rows, layout, op, entropy_bonus, stream);
      case DType::kFloat16:
        return grpo_loss_with_gradient<In, __half>(rows, layout, op, entropy_bonus, stream);
      default:
        break;
    }
  }
  return cudaErrorInvalidValue;
}

#define GRPO_FAST_LOSS_OF(In) \
  template cudaError_t grpo_loss_of<In>(const Rows&, const Layout&, const GrpoLoss&, bool, cudaStream_t)

extern GRPO_FAST_LOSS_OF(float);
extern GRPO_FAST_LOSS_OF(__nv_bfloat16);
extern GRPO_FAST_LOSS_OF(__half);

}  // namespace grpo_fast
