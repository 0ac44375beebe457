// Launches fill.cu; a header of its own, as bindings.cpp is compiled without nvcc.
#pragma once

#include <cstdint>
#include <cuda_runtime_api.h>

namespace grpo_fast {

cudaError_t fill(float* out, int64_t numel, float value, cudaStream_t stream);

}  // namespace grpo_fast
