// The token-level GRPO loss of one row. The definition is grpo_fast/reference.py; the names are its names.

#pragma once

#include "api.h"

namespace grpo_fast {

struct TokenLoss {
  float loss;    // policy + beta KL
  float d_logp;  // its derivative by logp
  float kl;
  float ratio;
  float clip;  // -1 for a ratio below the bounds and a negative advantage, 1 above them and a positive one, else 0
};

// The derivative of min(x, y), torch's way: half of each where they are equal.
__device__ inline float either(float x, float y, float if_x_less, float if_y_less) {
  return x < y ? if_x_less : (y < x ? if_y_less : 0.5f * (if_x_less + if_y_less));
}

// `chosen`: whether the policy term acts.
__device__ inline TokenLoss token_loss(float logp, float old_logp, float ref_logp, float advantage, float sampler_ratio,
                                       bool chosen, const LossOptions& o) {
  const float ratio = expf(logp - old_logp);
  float policy, slope, clip = 0.0f;
  if (o.term == kClipped) {
    const float bounded = fminf(ratio, o.delta);
    const float x = bounded * advantage;
    const float y = fminf(fmaxf(ratio, o.low), o.high) * advantage;
    policy = -fminf(x, y);
    const float free = ratio <= o.delta ? 1.0f : 0.0f;
    const float inside = ratio >= o.low && ratio <= o.high ? 1.0f : 0.0f;
    slope = -advantage * either(x, y, free, inside);
    if (o.has_dual_clip && advantage < 0.0f) {
      const float most = -o.dual_clip * advantage;
      slope = either(policy, most, slope, 0.0f);
      policy = fminf(policy, most);
    }
    slope *= ratio;
    if (bounded < o.low && advantage < 0.0f) clip = -1.0f;
    if (bounded > o.high && advantage > 0.0f) clip = 1.0f;
  } else if (o.term == kCispo) {
    slope = -fminf(fmaxf(ratio, o.low), o.high) * advantage;
    policy = slope * logp;
    if (ratio > o.high && advantage > 0.0f) clip = 1.0f;
  } else {
    const float tau = advantage > 0.0f ? o.tau_pos : o.tau_neg;
    const float gate = 1.0f / (1.0f + expf(-tau * (ratio - 1.0f)));
    policy = -4.0f * gate / tau * advantage;
    slope = -4.0f * gate * (1.0f - gate) * advantage * ratio;
  }
  TokenLoss token = {chosen ? policy * sampler_ratio : 0.0f, chosen ? slope * sampler_ratio : 0.0f, 0.0f, ratio, clip};
  if (o.kl_estimator != kNoKL) {
    const float d = ref_logp - logp;
    float d_kl;
    if (o.kl_estimator == kK1) {
      token.kl = -d, d_kl = 1.0f;
    } else if (o.kl_estimator == kK2) {
      token.kl = 0.5f * d * d, d_kl = -d;
    } else {
      const float growth = expm1f(d);
      // expm1(d) - d cancels where d is small.
      token.kl = fabsf(d) < 0.03f ? d * d * (0.5f + d * (1.0f / 6.0f + d * (1.0f / 24.0f + d / 120.0f))) : growth - d;
      d_kl = -growth;
    }
    if (o.bias_correction) {
      d_kl = (d_kl + token.kl) * ratio;
      token.kl *= ratio;
    }
    token.loss += o.beta * token.kl;
    token.d_logp += o.beta * d_kl;
  }
  // Comparisons are deaf to NaN: a ratio that is none must not end as a gradient of 0.
  if (isnan(ratio) && chosen) token.loss = token.d_logp = ratio;
  return token;
}

}  // namespace grpo_fast
