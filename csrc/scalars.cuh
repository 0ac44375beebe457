// Values of any dtype, one at a time: what a loss takes beside the logits.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "api.h"

namespace grpo_fast {

__device__ inline float load(const Values& values, int64_t i) {
  switch (values.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(values.data)[i];
    case DType::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(values.data)[i]);
    case DType::kFloat16:
      return __half2float(static_cast<const __half*>(values.data)[i]);
    case DType::kFloat64:
      return static_cast<float>(static_cast<const double*>(values.data)[i]);
    case DType::kInt32:
      return static_cast<float>(static_cast<const int32_t*>(values.data)[i]);
    case DType::kInt64:
      return static_cast<float>(static_cast<const int64_t*>(values.data)[i]);
    default:
      return static_cast<const uint8_t*>(values.data)[i];
  }
}

__device__ inline float load_or(const Values& values, int64_t i, float otherwise) {
  return values.data == nullptr ? otherwise : load(values, i);
}

// Whether a mask keeps i; one that is None keeps all.
__device__ inline bool keeps(const Values& mask, int64_t i) {
  if (mask.data == nullptr) return true;
  if (mask.dtype == DType::kFloat64) return static_cast<const double*>(mask.data)[i] != 0.0;  // as float it may be 0
  return load(mask, i) != 0.0f;
}

__device__ inline int64_t integer(const Values& ids, int64_t i) {
  return ids.dtype == DType::kInt32 ? static_cast<const int32_t*>(ids.data)[i]
                                    : static_cast<const int64_t*>(ids.data)[i];
}

}  // namespace grpo_fast
