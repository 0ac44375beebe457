#include <cuda_runtime.h>

#include "api.h"
#include "scalars.cuh"

namespace grpo_fast {
namespace {

constexpr int kThreads = 512;

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Min {
  __device__ float operator()(float a, float b) const { return fminf(a, b); }
};

// Reduce a value a thread over the block, in a fixed order; every thread gets the result.
template <typename F>
__device__ float reduce(float value, F combine) {
  __shared__ float warps[kThreads / 32];
  for (int lane = 16; lane > 0; lane /= 2) value = combine(value, __shfl_xor_sync(~0u, value, lane));
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = warps[0];
  for (int i = 1; i < kThreads / 32; ++i) value = combine(value, warps[i]);
  return value;
}

// Tokens of a sequence, or members of a group.
struct Range {
  int start, end;

  __device__ static Range of(const Batch& batch, int b) {
    if (b >= batch.count) return {0, 0};
    if (batch.ends.data == nullptr) return {b * batch.T, (b + 1) * batch.T};
    // What is out of range, which the host has not seen, stays within the tokens all the same.
    const auto end = [&](int i) {
      return static_cast<int>(min(max(integer(batch.ends, i), int64_t(0)), int64_t(batch.N)));
    };
    return {b > 0 ? end(b - 1) : 0, end(b)};
  }
};

// How many tokens both masks keep; a mask that is None keeps all.
__device__ float count_tokens(const Values& mask, const Values& chosen, Range range) {
  if (mask.data == nullptr && chosen.data == nullptr) return range.end - range.start;
  float count = 0.0f;
  for (int n = range.start + threadIdx.x; n < range.end; n += kThreads) {
    count += keeps(mask, n) && keeps(chosen, n);
  }
  return reduce(count, Add());
}

struct Spread {
  float best, mean, std;  // the mean relative to the best
};

// Of the scorable rewards of a range. Relative to the best, equal rewards are 0 and stay 0, whatever their sum rounds
// to.
__device__ Spread spread(const Values& rewards, Range range) {
  float best = -INFINITY;
  for (int i = range.start + threadIdx.x; i < range.end; i += kThreads) best = fmaxf(best, load(rewards, i));
  best = reduce(best, Max());
  float count = 0.0f, total = 0.0f;
  for (int i = range.start + threadIdx.x; i < range.end; i += kThreads) {
    const float r = load(rewards, i);
    if (!isnan(r)) count += 1.0f, total += r - best;
  }
  count = reduce(count, Add());
  const float mean = reduce(total, Add()) / fmaxf(count, 1.0f);
  float squares = 0.0f;
  for (int i = range.start + threadIdx.x; i < range.end; i += kThreads) {
    const float r = load(rewards, i);
    if (!isnan(r)) squares += (r - best - mean) * (r - best - mean);
  }
  return {best, mean, sqrtf(reduce(squares, Add()) / fmaxf(count - 1.0f, 1.0f))};
}

// A block a sequence, and one where there is none.
__global__ void __launch_bounds__(kThreads) plan_kernel(const Batch batch, const PlanInputs in, const Plan out) {
  const int b = blockIdx.x;
  const Range range = Range::of(batch, b);
  const int last = batch.ends.data == nullptr ? batch.N : Range::of(batch, max(batch.count, 1) - 1).end;

  float weight = 1.0f / (in.num_items.data == nullptr ? in.divisor : fmaxf(load(in.num_items, 0), 1.0f));
  if (in.reduction == kByTokens) weight = 1.0f / fmaxf(count_tokens(batch.mask, Values{}, {0, last}), 1.0f);
  if (in.reduction == kBySequence) weight /= fmaxf(count_tokens(batch.mask, Values{}, range), 1.0f);
  if (b == 0) {
    float items = 1.0f;
    if (in.entropy_items.data != nullptr) {
      items = load(in.entropy_items, 0);
    } else if (in.entropy_coef != 0.0f) {
      items = fmaxf(count_tokens(batch.mask, batch.entropy_mask, {0, last}), 1.0f);
    }
    if (threadIdx.x == 0) *out.d_entropy = -in.entropy_coef / items;
  }

  float advantage = 0.0f;
  if (b >= batch.count) {
    // only padding
  } else if (in.rewards.data != nullptr) {
    const int group = b / in.group_size * in.group_size;
    const Spread s = spread(in.rewards, {group, group + in.group_size});
    float scale = 1.0f;
    if (in.scale_rewards == kGroup) scale = s.std + 1e-4f;
    if (in.scale_rewards == kBatch) scale = spread(in.rewards, {0, batch.count}).std + 1e-4f;
    const float reward = load(in.rewards, b);
    advantage = isnan(reward) ? 0.0f : (reward - s.best - s.mean) / scale;
    if (threadIdx.x == 0) out.zero_std[b] = s.std <= 1e-8f;
  } else if (!in.per_token_advantages) {
    advantage = load(in.advantages, b);
  }

  // The last block also takes what is packed behind the last sequence.
  const int end = b + 1 >= batch.count ? batch.N : range.end;
  for (int n = range.start + threadIdx.x; n < end; n += kThreads) {
    const bool kept = n < range.end && keeps(batch.mask, n);
    out.weights[n] = kept ? load_or(in.token_weights, n, weight) : 0.0f;
    out.advantages[n] = in.per_token_advantages ? load(in.advantages, n) : advantage;
    if (out.kept != nullptr) out.kept[n] = kept;
    if (out.sampler_ratio != nullptr) {
      out.sampler_ratio[n] = load(in.sampler_ratio, in.per_token_sampler_ratio ? n : min(b, batch.count - 1));
    }
  }
}

// What a sequence adds up to.
enum Part : int {
  kTokens,
  kLoss,
  kEntropy,
  kKL,
  kRatio,
  kLargest,
  kBonus,
  kBonusTokens,
  kLow,
  kHigh,
  kLowMin,
  kHighMax,
  kZeroStd,
};
static_assert(kZeroStd + 1 == kPartial);

__device__ bool is_maximum(int part) { return part == kLargest || part == kHighMax; }

__device__ float reduce_part(int part, float value) {
  if (is_maximum(part)) return reduce(value, Max());
  return part == kLowMin ? reduce(value, Min()) : reduce(value, Add());
}

// A block a sequence; the one that ends last adds the sequences up.
__global__ void __launch_bounds__(kThreads)
    sum_rows_kernel(const Batch batch, const RowResults rows, const float* zero_std, float entropy_coef,
                    float* partials, int* finished, float* results) {
  const int b = blockIdx.x;
  float part[kPartial] = {};
  part[kLargest] = -INFINITY;
  const Range range = Range::of(batch, b);
  for (int n = range.start + threadIdx.x; n < range.end; n += kThreads) {
    if (!keeps(batch.mask, n)) continue;
    part[kTokens] += 1.0f;
    part[kLoss] += rows.losses[n];
    part[kEntropy] += rows.entropies[n];
    if (rows.kls != nullptr) part[kKL] += rows.kls[n];
    part[kRatio] += rows.ratios[n];
    part[kLargest] = fmaxf(part[kLargest], rows.ratios[n]);
    part[kLow] += rows.clips[n] < 0.0f;
    part[kHigh] += rows.clips[n] > 0.0f;
    if (entropy_coef != 0.0f && keeps(batch.entropy_mask, n)) {
      part[kBonus] += rows.entropies[n];
      part[kBonusTokens] += 1.0f;
    }
  }
#pragma unroll
  for (int i = 0; i <= kHigh; ++i) part[i] = reduce_part(i, part[i]);

  __shared__ bool last;
  if (threadIdx.x == 0) {
    const bool any = part[kTokens] > 0.0f;
    part[kLowMin] = any ? part[kLow] / part[kTokens] : INFINITY;
    part[kHighMax] = any ? part[kHigh] / part[kTokens] : -INFINITY;
    part[kZeroStd] = zero_std != nullptr && b < batch.count ? zero_std[b] : 0.0f;
#pragma unroll
    for (int i = 0; i < kPartial; ++i) partials[b * kPartial + i] = part[i];
    __threadfence();
    last = atomicAdd(finished, 1) == static_cast<int>(gridDim.x) - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();

#pragma unroll
  for (int i = 0; i < kPartial; ++i) {
    float value = is_maximum(i) ? -INFINITY : (i == kLowMin ? INFINITY : 0.0f);
    for (int s = threadIdx.x; s < static_cast<int>(gridDim.x); s += kThreads) {
      const float other = __ldcg(&partials[s * kPartial + i]);
      if (is_maximum(i)) {
        value = fmaxf(value, other);
      } else {
        value = i == kLowMin ? fminf(value, other) : value + other;
      }
    }
    part[i] = reduce_part(i, value);
  }
  if (threadIdx.x != 0) return;
  const float active = part[kTokens], count = fmaxf(active, 1.0f);
  const float mean_ratio = part[kRatio] / count;
  results[0] = part[kLoss];
  if (entropy_coef != 0.0f) results[0] -= entropy_coef * part[kBonus] / fmaxf(part[kBonusTokens], 1.0f);
  results[1] = part[kLoss];
  results[2] = active;
  results[3] = part[kEntropy] / count;
  results[4] = part[kKL] / count;
  results[5] = mean_ratio;
  results[6] = isnan(mean_ratio) ? mean_ratio : part[kLargest];  // a maximum is deaf to NaN
  results[7] = part[kLow] / count;
  results[8] = active > 0.0f ? part[kLowMin] : NAN;
  results[9] = part[kHigh] / count;
  results[10] = active > 0.0f ? part[kHighMax] : NAN;
  results[11] = (part[kLow] + part[kHigh]) / count;
  results[12] = part[kZeroStd] / fmaxf(batch.count, 1.0f);
}

}  // namespace

cudaError_t plan(const Batch& batch, const PlanInputs& inputs, const Plan& plan, cudaStream_t stream) {
  plan_kernel<<<max(batch.count, 1), kThreads, 0, stream>>>(batch, inputs, plan);
  return cudaGetLastError();
}

cudaError_t sum_rows(const Batch& batch, const RowResults& rows, const float* zero_std, float entropy_coef,
                     float* partials, float* results, cudaStream_t stream) {
  const int blocks = max(batch.count, 1);
  int* finished = reinterpret_cast<int*>(partials + int64_t(blocks) * kPartial);
  const cudaError_t error = cudaMemsetAsync(finished, 0, sizeof(int), stream);
  if (error != cudaSuccess) return error;
  sum_rows_kernel<<<blocks, kThreads, 0, stream>>>(batch, rows, zero_std, entropy_coef, partials, finished, results);
  return cudaGetLastError();
}

}  // namespace grpo_fast
