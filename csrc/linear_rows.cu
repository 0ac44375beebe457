// From the statistics of rows to log-probs, the loss and the gradient of the logits, over the exponentials that the
// product left (linear_statistics.cu).

#include "conversion.cuh"
#include "grpo_loss.cuh"
#include "head.cuh"

namespace grpo_fast {
namespace {

constexpr int kThreads = 128;
constexpr int kVectorsABlock = kThreads * kVectorsAThread;

// A row's softmax, from what the lanes found.
__device__ Softmax softmax(const Head& head, const Partials& partials, int n) {
  Statistics rest;
  for (int lane = 0; lane < *partials.lanes; ++lane) {
    const float4 part = partials.values[int64_t(lane) * partials.stride + n];
    rest.merge({part.x, part.y, part.z, part.w}, head.options.slope * kLog2e);
  }
  const int64_t id = integer(head.ids, n);
  return Softmax::from(rest, id >= 0 && id < head.V, head.options);
}

// Kernels by row: a thread each.

__global__ void log_probs_kernel(const Head head, const Partials partials, const LogProbs results) {
  const int n = blockIdx.x * kThreads + threadIdx.x;
  if (n >= rows_of(head)) return;
  const Softmax row = softmax(head, partials, n);
  results.logps[n] = row.logp;
  results.shifts[n] = row.shift;
  results.totals[n] = row.total;
  if (results.entropies != nullptr) results.entropies[n] = row.entropy;
}

__global__ void loss_kernel(const Head head, const Partials partials, const GrpoLoss op, Slopes* slopes) {
  const int n = blockIdx.x * kThreads + threadIdx.x;
  if (n >= rows_of(head)) return;
  if (op.plan.kept != nullptr && op.plan.kept[n] == 0) {
    op.skip(n);
    if (slopes != nullptr) slopes[n] = {};
    return;
  }
  const Softmax row = softmax(head, partials, n);
  const GrpoLoss::Result result = op.evaluate(op.load(n), row);
  op.store(n, row, result);
  if (slopes != nullptr) slopes[n] = Slopes::from(row, result.d_logp, result.d_entropy, head.options);
}

__global__ void slopes_kernel(const Head head, const LogProbs results, const uint8_t* kept, const float* d_logps,
                              const float* d_entropies, Slopes* slopes) {
  const int n = blockIdx.x * kThreads + threadIdx.x;
  if (n >= rows_of(head)) return;
  const int64_t id = integer(head.ids, n);
  const bool counts = kept == nullptr || kept[n] != 0, sampled = id >= 0 && id < head.V, tilt = d_entropies != nullptr;
  const Softmax row = {results.logps[n], tilt ? results.entropies[n] : 0.0f, results.shifts[n], results.totals[n],
                       sampled};
  slopes[n] =
      Slopes::from(row, counts && sampled ? d_logps[n] : 0.0f, counts && tilt ? d_entropies[n] : 0.0f, head.options);
}

template <typename Kernel, typename... Arguments>
cudaError_t launch_by_row(Kernel* kernel, const Head& head, cudaStream_t stream, Arguments... arguments) {
  kernel<<<(head.count + kThreads - 1) / kThreads, kThreads, 0, stream>>>(head, arguments...);
  return cudaGetLastError();
}

// A block a slice of a row, of all rows or of those in `which`: each exponential is read once and the gradient written
// in its place. Neighbouring blocks are at neighbouring slices.
template <bool kTilt>
__global__ void __launch_bounds__(kThreads) gradient_kernel(const Conversion all, const int64_t* which) {
  const Slices<kVectorsABlock> slices(all.head, all.exponentials);
  const int place = blockIdx.x / slices.count();
  const RowConversion row(all, which == nullptr ? place : static_cast<int>(which[place]));
  const SliceOfRow slice = slices[blockIdx.x % slices.count()];
  if (row.far()) {
    row.project(slice, threadIdx.x / 32, kThreads / 32);
  } else {
    row.convert<kTilt, kThreads>(slice, slice.first + threadIdx.x);
  }
}

}  // namespace

cudaError_t linear_log_probs(const Head& head, const Partials& partials, const LogProbs& results, cudaStream_t stream) {
  return launch_by_row(log_probs_kernel, head, stream, partials, results);
}

cudaError_t linear_loss(const Head& head, const Partials& partials, const LossOptions& options, const Plan& plan,
                        const TokenInputs& inputs, const RowResults& results, float4* slopes, cudaStream_t stream) {
  const GrpoLoss op = {options, plan, inputs, results};
  return launch_by_row(loss_kernel, head, stream, partials, op, reinterpret_cast<Slopes*>(slopes));
}

cudaError_t linear_slopes(const Head& head, const LogProbs& results, const uint8_t* kept, const float* d_logps,
                          const float* d_entropies, float4* slopes, cudaStream_t stream) {
  return launch_by_row(slopes_kernel, head, stream, results, kept, d_logps, d_entropies,
                       reinterpret_cast<Slopes*>(slopes));
}

cudaError_t linear_gradient(const Conversion& all, const int64_t* which, int count, cudaStream_t stream) {
  const auto kernel = all.tilted ? gradient_kernel<true> : gradient_kernel<false>;
  const unsigned slices = Slices<kVectorsABlock>(all.head, all.exponentials).count();
  kernel<<<count * slices, kThreads, 0, stream>>>(all, which);
  return cudaGetLastError();
}

}  // namespace grpo_fast
