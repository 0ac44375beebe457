// Multiply a gradient by the upstream gradient of the loss, in place; by 1, which is the rule, nothing is touched.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "api.h"
#include "row.cuh"

namespace grpo_fast {
namespace {

constexpr int kThreads = 512;

template <typename T>
__global__ void __launch_bounds__(kThreads) scale_gradient_kernel(T* gradient, int64_t stride_b, int64_t stride_t,
                                                                  int count, int length, int V, const float* factor) {
  const float value = *factor;
  if (value == 1.0f) return;
  constexpr int kSize = Vector<T>::kSize;
  for (int n = blockIdx.x; n < count; n += gridDim.x) {
    T* row = gradient + n / length * stride_b + n % length * stride_t;
    const auto scale_one = [&](int i) { store(row + i, static_cast<float>(row[i]) * value); };
    const int head = min(static_cast<int>(-reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T)), V);
    const int vectors = (V - head) / kSize;
    for (int i = threadIdx.x; i < vectors; i += kThreads) {
      T* to = row + head + i * kSize;
      float x[kSize];
      unpack(__ldcs(reinterpret_cast<const uint4*>(to)), x, T());
#pragma unroll
      for (int j = 0; j < kSize; ++j) x[j] *= value;
      store_together(to, x);
    }
    for (int i = threadIdx.x; i < head; i += kThreads) scale_one(i);
    for (int i = head + vectors * kSize + threadIdx.x; i < V; i += kThreads) scale_one(i);
  }
}

template <typename T>
cudaError_t scale(void* gradient, int64_t stride_b, int64_t stride_t, int count, int length, int V, const float* factor,
                  cudaStream_t stream) {
  const int blocks = count < 1024 ? count : 1024;  // a few an SM
  scale_gradient_kernel<<<blocks, kThreads, 0, stream>>>(static_cast<T*>(gradient), stride_b, stride_t, count, length,
                                                         V, factor);
  return cudaGetLastError();
}

}  // namespace

cudaError_t scale_gradient(void* gradient, DType dtype, int64_t stride_b, int64_t stride_t, int count, int length,
                           int V, const float* factor, cudaStream_t stream) {
  switch (dtype) {
    case DType::kFloat32:
      return scale<float>(gradient, stride_b, stride_t, count, length, V, factor, stream);
    case DType::kBFloat16:
      return scale<__nv_bfloat16>(gradient, stride_b, stride_t, count, length, V, factor, stream);
    case DType::kFloat16:
      return scale<__half>(gradient, stride_b, stride_t, count, length, V, factor, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace grpo_fast
