// Single logits from hidden states, where a matrix product would be too much.

#pragma once

#include "api.h"
#include "row.cuh"

namespace grpo_fast {

__device__ inline int rows_of(const Head& head) {
  if (head.counted == nullptr) return head.count;
  return static_cast<int>(max(min(int64_t(head.count), *head.counted), int64_t(0)));
}

// The logit of a word in row n, before scale and softcap, or the share in it of one of so many lanes.
template <typename T>
__device__ inline float logit(const Head& head, int n, int word, int lane, int lanes) {
  const T* x = static_cast<const T*>(head.hidden.data) + n * head.hidden_stride;
  const T* w = static_cast<const T*>(head.weight.data) + word * head.weight_stride;
  float sum = lane == 0 && head.bias != nullptr ? head.bias[word] : 0.0f;
  for (int vector = lane; vector < head.H / 8; vector += lanes) {
    float a[8], b[8];
    unpack(reinterpret_cast<const uint4*>(x)[vector], a, T());
    unpack(reinterpret_cast<const uint4*>(w)[vector], b, T());
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = __fmaf_rn(a[i], b[i], sum);
  }
  for (int k = head.H / 8 * 8 + lane; k < head.H; k += lanes) {
    sum = __fmaf_rn(static_cast<float>(x[k]), static_cast<float>(w[k]), sum);
  }
  return sum;
}

}  // namespace grpo_fast
