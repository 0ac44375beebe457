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

__device__ inline void put_row(const SparseRows& out, int n, int64_t start, int64_t end) {
  out.starts[n] = start;
  out.ends[n] = end;
}

__device__ inline void leave_dense(const SparseRows& out, int n) {
  put_row(out, n, 0, -1);
  atomicAdd(&out.totals->dense, 1ull);
}

// Whether the rows so far are enough to know that most of them are too flat.
__device__ inline bool given_up(const SparseRows& out) {
  const volatile SparseTotals* now = out.totals;
  const unsigned long long dense = now->dense + (now->in_long > out.long_room ? now->longs : 0ull);
  return now->in_short > out.short_room || dense > out.most_dense;
}

// A block a row. Where in the pool its elements lie depends on which block is first, not what they are, nor their
// order. A block that ends because of given_up, or finds no room, leaves what the host will not look at: totals only
// grow, so they tell the host what they told the block.
template <bool kTilt>
__global__ void __launch_bounds__(kThreads, 3)
    sparse_kernel(const Head head, const Exponentials exponentials, const Slopes* all, const float* usual,
                  float tolerance, const SparseRows out) {
  const int n = blockIdx.x, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const Slopes slopes = all[n];
  const float up = exponentials.bases[n] - slopes.shift, factor = exp2f(up);
  const float reference = fmaxf(fabsf(slopes.at_target), *usual), scale = 1.0f / reference;
  if (slopes.zero()) {
    if (thread == 0) put_row(out, n, 0, 0);
    return;
  }
  const bool finite = fabsf(slopes.at_target) < 1e30f && reference > 1e-30f && reference < 1e30f;
  if (-up > kFar || !finite) {
    if (thread == 0) leave_dense(out, n);
    return;
  }
  __shared__ int bins[kBins];
  __shared__ int starts[kTurns * kWarps];
  __shared__ float small[kWarps];
  __shared__ int chosen;
  __shared__ int64_t place;
  __shared__ bool skip;
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
  if (thread == 0) skip = given_up(out);
  __syncthreads();
  if (skip) return;
  // How many elements there are of each power, and what those below add up to.
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
  // The fewest powers that are enough, and a place in the pool for their elements.
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
    skip = !fits || kept > out.long_most;
    if (skip) {
      leave_dense(out, n);
    } else {
      const bool is_long = kept > out.short_most;
      const unsigned long long more = kept, room = is_long ? out.long_room : out.short_room;
      const unsigned long long before = atomicAdd(is_long ? &out.totals->in_long : &out.totals->in_short, more);
      if (is_long) atomicAdd(&out.totals->longs, 1ull);
      place = static_cast<int64_t>(before + (is_long ? out.short_room : 0ull));
      put_row(out, n, place, place + kept);
      skip = kept == 0 || before + more > room;
    }
  }
  __syncthreads();
  if (skip) return;

  // Where in that place each warp's begin, in the order of the words: of (turn, warp). Most have nothing in most turns.
  const uint64_t warps_turns = __reduce_or_sync(~0u, static_cast<unsigned>(seen)) |
                               uint64_t(__reduce_or_sync(~0u, static_cast<unsigned>(seen >> 32))) << 32;
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
    int count = 0;
    if (warps_turns >> turn & 1) {
      float x[8];
      count = __reduce_add_sync(~0u, __popc(kept_of(turn, x)));
    }
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
  // What is kept, to its place.
  for (uint64_t left = warps_turns; left != 0; left &= left - 1) {
    const int turn = __ffsll(static_cast<long long>(left)) - 1;
    float x[8];
    const unsigned kept = kept_of(turn, x);
    const int mine = __popc(kept);
    int sum = mine;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, sum, step);
      sum += lane >= step ? other : 0;
    }
    int64_t at = place + starts[turn * kWarps + warp] + sum - mine;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (kept >> i & 1) {
        const int64_t word = (turn * kThreads + thread) * 8 + i;
        out.keys[at] = word << 32 | (out.first_row + n);
        out.values[at++] = x[i] * reference;
      }
    }
  }
}

// Sums of rows of a matrix, in slices of its columns. A warp has a sum of few entries; those of many are shared by the
// warps of a block, each of which takes consecutive ones, and added up in order.

constexpr int kSumWarps = 16, kSlice = 8 * 32, kFew = 32;

__device__ inline void put_together(float* to, const float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = x[i];  // which may lie anywhere
}
__device__ inline void put_together(__nv_bfloat16* to, const float (&x)[8]) { store_together(to, x); }

template <typename Out>
__global__ void __launch_bounds__(32 * kSumWarps)
    sum_kernel(const Entries entries, const __nv_bfloat16* matrix, int64_t stride, int rows, int width,
               const float* base, Out* out) {
  __shared__ float partial[kSumWarps][kSlice];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, before = blockIdx.x * kSumWarps;
  const int start = blockIdx.y * kSlice, column = start + 8 * lane;
  const bool inside = column < width;
  const auto sum_of = [&](int64_t first, int64_t last, float (&sum)[8]) {
    for (int64_t chunk = first; chunk < last; chunk += 32) {
      const int count = static_cast<int>(min(int64_t(32), last - chunk));
      const int index = lane < count ? entries.index[2 * (chunk + lane)] : 0;
      const float weight = lane < count ? entries.weights[chunk + lane] : 0.0f;
      for (int e = 0; e < count; e += kAtOnce) {
        uint4 raw[kAtOnce];
        float by[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int64_t row = __shfl_sync(~0u, index, e + i);
          by[i] = __shfl_sync(~0u, weight, e + i);
          raw[i] =
              inside && e + i < count ? __ldg(reinterpret_cast<const uint4*>(matrix + row * stride + column)) : uint4{};
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          float x[8];
          unpack(raw[i], x, __nv_bfloat16());
#pragma unroll
          for (int j = 0; j < 8; ++j) sum[j] = __fmaf_rn(by[i], x[j], sum[j]);
        }
      }
    }
  };

  const int row = before + warp;
  const int64_t first = row < rows ? entries.starts[row] : 0, last = row < rows ? entries.ends[row] : 0;
  const bool many = last - first > kFew;
  // What is added to in place needs no visit where nothing is added.
  const bool in_place = static_cast<const void*>(base) == static_cast<const void*>(out);
  if (row < rows && !many && !(in_place && first >= last)) {
    float sum[8] = {};
    sum_of(first, last, sum);
    if (inside) {
      const int64_t at = int64_t(row) * width + column;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] += base != nullptr ? base[at + i] : 0.0f;
      put_together(out + at, sum);
    }
  }
  if (!__syncthreads_or(many)) return;
  for (int other = before; other < min(before + kSumWarps, rows); ++other) {
    const int64_t begin = entries.starts[other], end = entries.ends[other];
    if (end - begin <= kFew) continue;
    const int64_t share = ((end - begin + 32 * kSumWarps - 1) / (32 * kSumWarps)) * 32;
    float sum[8] = {};
    sum_of(begin + warp * share, min(end, begin + (warp + 1) * share), sum);
#pragma unroll
    for (int i = 0; i < 8; ++i) partial[warp][8 * lane + i] = sum[i];
    __syncthreads();
    if (threadIdx.x < kSlice && start + threadIdx.x < width) {
      const int64_t at = int64_t(other) * width + start + threadIdx.x;
      float total = base != nullptr ? base[at] : 0.0f;
      for (int w = 0; w < kSumWarps; ++w) total += partial[w][threadIdx.x];
      out[at] = static_cast<Out>(total);
    }
    __syncthreads();
  }
}

}  // namespace

cudaError_t sparse_rows(const Head& head, const Exponentials& exponentials, const float4* slopes, bool tilted,
                        const float* usual, float tolerance, const SparseRows& out, cudaStream_t stream) {
  if (head.V > kSparseWords) return cudaErrorInvalidValue;
  const auto kernel = tilted ? sparse_kernel<true> : sparse_kernel<false>;
  kernel<<<head.count, kThreads, 0, stream>>>(head, exponentials, reinterpret_cast<const Slopes*>(slopes), usual,
                                              tolerance, out);
  return cudaGetLastError();
}

cudaError_t sum_of_rows(const Entries& entries, const Values& matrix, int64_t stride, int rows, int width,
                        const float* base, void* out, DType out_dtype, cudaStream_t stream) {
  const dim3 grid((rows + kSumWarps - 1) / kSumWarps, (width + kSlice - 1) / kSlice);
  const auto* from = static_cast<const __nv_bfloat16*>(matrix.data);
  const auto launch = [&](auto* to) {
    sum_kernel<<<grid, 32 * kSumWarps, 0, stream>>>(entries, from, stride, rows, width, base, to);
  };
  out_dtype == DType::kFloat32 ? launch(static_cast<float*>(out)) : launch(static_cast<__nv_bfloat16*>(out));
  return cudaGetLastError();
}

}  // namespace grpo_fast
