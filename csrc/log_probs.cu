// Log-probs of chosen tokens and entropy over logits, and the gradient from upstream gradients of both.

#include "resident.cuh"
#include "scalars.cuh"

namespace grpo_fast {
namespace {

struct LogProbsOp {
  LogProbs results;

  struct Inputs {};
  struct Result {
    float d_logp = 0.0f, d_entropy = 0.0f;  // there is no gradient yet
  };

  __device__ Inputs load(int) const { return {}; }

  __device__ Result evaluate(const Inputs&, const Softmax&) const { return {}; }

  __device__ void store(int n, const Softmax& row, const Result&) const {
    results.logps[n] = row.logp;
    results.shifts[n] = row.shift;
    results.totals[n] = row.total;
    if (results.entropies != nullptr) results.entropies[n] = row.entropy;
  }

  __device__ void skip(int n) const {
    results.logps[n] = 0.0f;
    if (results.entropies != nullptr) results.entropies[n] = 0.0f;
  }
};

constexpr int kThreads = 256;
constexpr int kVectorsAThread = 4;

// Block (n, slice): reads and writes each logit once, so it needs neither ring nor cluster.
template <typename T, typename Out, bool kSoftcap, bool kTilt>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(const Rows rows, const LogProbs results, const float* d_logps, const float* d_entropies) {
  constexpr int kSize = Vector<T>::kSize;
  const int n = blockIdx.x, rank = blockIdx.y, ranks = gridDim.y, thread = threadIdx.x;
  const LogitOptions options = rows.options;
  const float inner = options.slope * kLog2e;
  const int64_t id = integer(rows.ids, n);
  const bool sampled = id >= 0 && id < rows.V;

  __shared__ Slopes shared;
  if (thread == 0) {
    const bool kept = rows.kept == nullptr || rows.kept[n] != 0;
    const float d_logp = kept && sampled ? d_logps[n] : 0.0f, d_entropy = kept && kTilt ? d_entropies[n] : 0.0f;
    const Softmax row = {results.logps[n], kTilt ? results.entropies[n] : 0.0f, results.shifts[n], results.totals[n],
                         sampled};
    shared = Slopes::from(row, d_logp, d_entropy, options);
  }
  const Slice slice = Slice::of<T>(rows, n, rank, ranks);
  const T* row = static_cast<const T*>(rows.logits) + slice.row;
  Out* out = static_cast<Out*>(rows.out) + n / rows.T * rows.out_stride_b + n % rows.T * rows.out_stride_t;
  Out* to = out + slice.head + int64_t(slice.first) * kSize;
  const bool together = lies_together<Out, kSize>(to);
  const uint4* body = reinterpret_cast<const uint4*>(row + slice.head) + slice.first;
  const int from_head = static_cast<int>(id) - slice.head;
  const int target_vector = sampled && from_head >= 0 ? from_head / kSize - slice.first : -1;
  const int target_place = from_head % kSize;
  __syncthreads();
  const Slopes slopes = shared;
  const bool zero = slopes.zero();

  for (int first = thread; first < slice.vectors; first += kThreads * kVectorsAThread) {
    uint4 raw[kVectorsAThread] = {};
#pragma unroll
    for (int j = 0; j < kVectorsAThread; ++j) {
      const int vector = first + j * kThreads;
      if (!zero && vector < slice.vectors) raw[j] = __ldcs(&body[vector]);
    }
#pragma unroll
    for (int j = 0; j < kVectorsAThread; ++j) {
      const int vector = first + j * kThreads;
      if (vector >= slice.vectors) break;
      float x[kSize] = {};
      if (!zero) {
        unpack(raw[j], x, T());
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const bool is_target = vector == target_vector && i == target_place;
          const float u = capped<kSoftcap>(x[i], options);
          x[i] = is_target ? slopes.of_target<kSoftcap>(u, options) : slopes.at<kSoftcap, kTilt>(u, inner, options);
        }
      }
      together ? store_together(to + vector * kSize, x) : store_apart(to + vector * kSize, x);
    }
  }
  const int edge = slice.edge(thread, rank, ranks, rows.V);
  if (edge >= 0) {
    const float u = capped<kSoftcap>(static_cast<float>(row[edge]), options);
    const float g = edge == id ? slopes.of_target<kSoftcap>(u, options) : slopes.at<kSoftcap, kTilt>(u, inner, options);
    store(out + edge, zero ? 0.0f : g);
  }
}

template <typename T>
cudaError_t rows_of(const Rows& rows, const Layout& layout, const LogProbsOp& op, cudaStream_t stream) {
  return rows.options.has_softcap ? launch_resident<T, T, true, false, false>(rows, op, layout, stream)
                                  : launch_resident<T, T, false, false, false>(rows, op, layout, stream);
}

template <typename T, typename Out>
cudaError_t gradient_of(const Rows& rows, const LogProbs& results, const float* d_logps, const float* d_entropies,
                        cudaStream_t stream) {
  const bool softcap = rows.options.has_softcap, tilt = d_entropies != nullptr;
  const auto kernel = softcap ? (tilt ? gradient_kernel<T, Out, true, true> : gradient_kernel<T, Out, true, false>)
                              : (tilt ? gradient_kernel<T, Out, false, true> : gradient_kernel<T, Out, false, false>);
  const int64_t a_block = int64_t(kThreads) * kVectorsAThread * Vector<T>::kSize;
  const int64_t slices = (rows.V + a_block - 1) / a_block;
  const dim3 grid(rows.count, static_cast<unsigned>(slices < 65535 ? slices : 65535));
  kernel<<<grid, kThreads, 0, stream>>>(rows, results, d_logps, d_entropies);
  return cudaGetLastError();
}

}  // namespace

cudaError_t log_probs_rows(const Rows& rows, const Layout& layout, const LogProbs& results, cudaStream_t stream) {
  const LogProbsOp op = {results};
  switch (rows.dtype) {
    case DType::kFloat32:
      return rows_of<float>(rows, layout, op, stream);
    case DType::kBFloat16:
      return rows_of<__nv_bfloat16>(rows, layout, op, stream);
    case DType::kFloat16:
      return rows_of<__half>(rows, layout, op, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t log_probs_gradient(const Rows& rows, const LogProbs& results, const float* d_logps,
                               const float* d_entropies, cudaStream_t stream) {
  const auto launch = [&](auto logit, auto gradient) {
    return gradient_of<decltype(logit), decltype(gradient)>(rows, results, d_logps, d_entropies, stream);
  };
  if (rows.dtype == DType::kFloat32) {
    switch (rows.out_dtype) {
      case DType::kFloat32:
        return launch(float(), float());
      case DType::kBFloat16:
        return launch(float(), __nv_bfloat16());
      case DType::kFloat16:
        return launch(float(), __half());
      default:
        return cudaErrorInvalidValue;
    }
  }
  if (rows.out_dtype != rows.dtype) return cudaErrorInvalidValue;
  switch (rows.dtype) {
    case DType::kBFloat16:
      return launch(__nv_bfloat16(), __nv_bfloat16());
    case DType::kFloat16:
      return launch(__half(), __half());
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace grpo_fast
