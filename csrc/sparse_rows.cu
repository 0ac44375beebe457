// The gradient of the logits as sparse rows, from their exponentials, and the products that it enters.
//
// A row keeps its largest elements: whatever is less than 2^-k times as large as a reference is dropped, for the
// smallest k whose dropped elements come to no more than `tolerance` of the reference in the L2 norm. The reference is
// the sampled token's element, to which the row's others add up, or that of the rows in the root mean square if this is
// larger: a row that hardly matters to the whole keeps little. Elements are counted by power of two, and added up only
// where they are small, by threads in a fixed order, so the choice is the same every time.

#include "exponential.cuh"
#include "scalars.cuh"

namespace grpo_fast {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kTurns = kSparseWords / (8 * kThreads);  // vectors of a thread, at most
constexpr int kAtOnce = 4;
constexpr int kBins = 16;  // SPARSE_POWERS in reference.py
static_assert(kTurns <= 64, "a thread remembers its vectors in 64 bits");

// The power of two that what is so many times as large as the reference falls short of it by, rounded down.
__device__ inline int bin_of(float relative) { return max(126 - static_cast<int>(__float_as_uint(relative) >> 23), 0); }

// Block i has row i, or the i-th in `which`. A row that cannot be sparse has a count above the capacity.
template <bool kTilt>
__global__ void __launch_bounds__(kThreads, 3)
    sparse_kernel(const Head head, const Exponentials exponentials, const Slopes* all, const int64_t* which,
                  const float* usual, float tolerance, const SparseRows out) {
  const int at = blockIdx.x, n = which == nullptr ? at : static_cast<int>(which[at]), thread = threadIdx.x,
            warp = thread / 32, lane = thread % 32;
  const Slopes slopes = all[n];
  const float up = exponentials.bases[n] - slopes.shift, factor = exp2f(up);
  const float reference = fmaxf(fabsf(slopes.at_target), *usual), scale = 1.0f / reference;
  if (slopes.zero()) {
    if (thread == 0) out.counts[at] = 0;
    return;
  }
  const bool finite = fabsf(slopes.at_target) < 1e30f && reference > 1e-30f && reference < 1e30f;
  if (-up > kFar || !finite) {
    if (thread == 0) out.counts[at] = out.capacity + 1;
    return;
  }
  __shared__ int bins[kBins];
  __shared__ int starts[kTurns * kWarps];
  __shared__ float small[kWarps];
  __shared__ int chosen, total;
  const int vectors = (head.V + 7) / 8, turns = (vectors + kThreads - 1) / kThreads;
  const int64_t id = integer(head.ids, n);
  const uint4* row = reinterpret_cast<const uint4*>(exponentials.values + n * exponentials.stride);
  // Elements relative to the reference.
  const auto relative = [&](int vector, uint4 raw, float (&x)[8]) {
    unpack_exponentials(raw, x);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = slopes.of_exponential<kTilt>(x[i], factor, up) * scale;
    if (id / 8 == vector) {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = i == id % 8 ? slopes.at_target * scale : x[i];
    }
  };

  if (thread < kBins) bins[thread] = 0;
  __syncthreads();
  uint64_t seen = 0;  // the vectors that may have something to keep
  float rest = 0.0f;  // the squares of what is below all bins
  for (int first = 0; first < turns; first += kAtOnce) {
    uint4 raw[kAtOnce] = {};
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int vector = (first + j) * kThreads + thread;
      if (vector < vectors) raw[j] = __ldg(&row[vector]);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int vector = (first + j) * kThreads + thread;
      if (vector >= vectors) break;
      float x[8], top = 0.0f, squares = 0.0f;
      relative(vector, raw[j], x);
#pragma unroll
      for (int i = 0; i < 8; ++i) top = fmaxf(top, fabsf(x[i])), squares = __fmaf_rn(x[i], x[i], squares);
      if (bin_of(top) >= kBins) {
        rest += squares;
        continue;
      }
      seen |= uint64_t(1) << (first + j);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int bin = bin_of(fabsf(x[i]));
        bin < kBins ? void(atomicAdd(&bins[bin], 1)) : void(rest = __fmaf_rn(x[i], x[i], rest));
      }
    }
  }
  for (int across = 16; across > 0; across /= 2) rest += __shfl_xor_sync(~0u, rest, across);
  if (lane == 0) small[warp] = rest;
  __syncthreads();
  if (thread == 0) {
    float dropped = 0.0f;
    for (int i = 0; i < kWarps; ++i) dropped += small[i];
    const float most = tolerance * tolerance;
    const bool fits = dropped <= most;
    int first = kBins;
    for (; first > 1; --first) {
      const float more = ldexpf(bins[first - 1], -2 * (first - 1));
      if (dropped + more > most) break;
      dropped += more;
    }
    int kept = 0;
    for (int bin = 0; bin < first; ++bin) kept += bins[bin];
    chosen = first;
    total = fits ? kept : out.capacity + 1;
    out.counts[at] = total;
  }
  __syncthreads();
  if (total > out.capacity) return;

  // Places in the order of the words: of (turn, warp), then within a warp.
  const auto kept_of = [&](int turn, float (&x)[8]) {
    unsigned kept = 0;
    if (seen >> turn & 1) {
      const int vector = turn * kThreads + thread;
      relative(vector, __ldg(&row[vector]), x);
#pragma unroll
      for (int i = 0; i < 8; ++i) kept |= unsigned(bin_of(fabsf(x[i])) < chosen) << i;
    }
    return kept;
  };
  for (int turn = 0; turn < turns; ++turn) {
    float x[8];
    const int count = __reduce_add_sync(~0u, __popc(kept_of(turn, x)));
    if (lane == 0) starts[turn * kWarps + warp] = count;
  }
  __syncthreads();
  if (warp == 0) {
    int before = 0;
    for (int first = 0; first < turns * kWarps; first += 32) {
      const int mine = first + lane < turns * kWarps ? starts[first + lane] : 0;
      int sum = mine;
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, sum, step);
        sum += lane >= step ? other : 0;
      }
      if (first + lane < turns * kWarps) starts[first + lane] = before + sum - mine;
      before += __shfl_sync(~0u, sum, 31);
    }
  }
  __syncthreads();
  for (int turn = 0; turn < turns; ++turn) {
    float x[8];
    const unsigned kept = kept_of(turn, x);
    const int mine = __popc(kept);
    int sum = mine;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, sum, step);
      sum += lane >= step ? other : 0;
    }
    int64_t place = int64_t(at) * out.capacity + starts[turn * kWarps + warp] + sum - mine;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (kept >> i & 1) {
        out.ids[place] = (turn * kThreads + thread) * 8 + i;
        out.values[place++] = x[i] * reference;
      }
    }
  }
}

// Sums of rows of a matrix: out[r] is, or is increased by, the sum over its entries e of values[e] *
// matrix[columns[e]]. Block (r, slice of the columns): groups of threads take every n-th entry and are added up in
// order.

constexpr int kGroupThreads = 128, kGroups = 4, kColumns = 8 * kGroupThreads;

__device__ inline void finish(float* out, const float (&sum)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] += sum[i];
}
__device__ inline void finish(__nv_bfloat16* out, const float (&sum)[8]) { store_together(out, sum); }

template <typename Out>
__global__ void __launch_bounds__(kGroupThreads* kGroups)
    sum_kernel(const int64_t* starts, const int32_t* columns, const float* values, const __nv_bfloat16* matrix,
               int64_t stride, int width, Out* out) {
  __shared__ float partial[kGroups - 1][kColumns];
  const int64_t first = starts[blockIdx.x], last = starts[blockIdx.x + 1];
  const int thread = threadIdx.x % kGroupThreads, group = threadIdx.x / kGroupThreads,
            column = blockIdx.y * kColumns + thread * 8;
  const bool adds = sizeof(Out) == 4;
  if (adds && first == last) return;
  float sum[8] = {};
  if (column < width) {
    for (int64_t e = first + group; e < last; e += kGroups * kAtOnce) {
      uint4 raw[kAtOnce];
      float value[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t at = e + i * kGroups;
        value[i] = at < last ? values[at] : 0.0f;
        raw[i] = at < last ? *reinterpret_cast<const uint4*>(matrix + columns[at] * stride + column) : uint4{};
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        float x[8];
        unpack(raw[i], x, __nv_bfloat16());
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[j] = __fmaf_rn(value[i], x[j], sum[j]);
      }
    }
  }
  if (group > 0) {
#pragma unroll
    for (int i = 0; i < 8; ++i) partial[group - 1][i * kGroupThreads + thread] = sum[i];
  }
  __syncthreads();
  if (group > 0 || column >= width) return;
  for (int g = 0; g < kGroups - 1; ++g) {
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] += partial[g][i * kGroupThreads + thread];
  }
  finish(out + int64_t(blockIdx.x) * width + column, sum);
}

}  // namespace

cudaError_t sparse_rows(const Head& head, const Exponentials& exponentials, const float4* slopes, bool tilted,
                        const int64_t* which, int count, const float* usual, float tolerance, const SparseRows& out,
                        cudaStream_t stream) {
  if (head.V > kSparseWords) return cudaErrorInvalidValue;
  const auto kernel = tilted ? sparse_kernel<true> : sparse_kernel<false>;
  kernel<<<count, kThreads, 0, stream>>>(head, exponentials, reinterpret_cast<const Slopes*>(slopes), which, usual,
                                         tolerance, out);
  return cudaGetLastError();
}

cudaError_t sum_of_rows(const int64_t* starts, const int32_t* columns, const float* values, const Values& matrix,
                        int64_t stride, int rows, int width, void* out, DType out_dtype, cudaStream_t stream) {
  const dim3 grid(rows, (width + kColumns - 1) / kColumns);
  const auto* from = static_cast<const __nv_bfloat16*>(matrix.data);
  if (out_dtype == DType::kFloat32) {
    sum_kernel<<<grid, kGroupThreads * kGroups, 0, stream>>>(starts, columns, values, from, stride, width,
                                                             static_cast<float*>(out));
  } else {
    sum_kernel<<<grid, kGroupThreads * kGroups, 0, stream>>>(starts, columns, values, from, stride, width,
                                                             static_cast<__nv_bfloat16*>(out));
  }
  return cudaGetLastError();
}

}  // namespace grpo_fast
