// Products with sparse rows: sums of rows of a matrix, in slices of its columns. A warp has some of its block's sums,
// one after the other; those of many entries are shared by the warps, each of which takes consecutive ones, and added
// up in order.

#include "api.h"
#include "row.cuh"
#include "sparse_limits.cuh"

namespace grpo_fast {
namespace {

constexpr int kAtOnce = 4;
constexpr int kWarps = 16, kMostSums = 4 * kWarps;  // of a block
constexpr int kSlice = 8 * 32, kFew = 32;
constexpr int kBlocks = 2048;  // for which blocks have fewer sums

__device__ inline void put_together(float* to, const float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = x[i];  // which may lie anywhere
}
__device__ inline void put_together(__nv_bfloat16* to, const float (&x)[8]) { store_together(to, x); }

// Adds the entries from first to last, in this lane's columns.
__device__ inline void add(const Entries& entries, int64_t first, int64_t last, const __nv_bfloat16* columns,
                           int64_t stride, bool inside, float (&sum)[8]) {
  const int lane = threadIdx.x % 32;
  for (int64_t chunk = first; chunk < last; chunk += 32) {
    const int count = static_cast<int>(min(int64_t(32), last - chunk));
    const int index = lane < count ? entries.index[2 * (chunk + lane)] & INT32_MAX : 0;
    const float weight = lane < count ? entries.weights[chunk + lane] : 0.0f;
    for (int e = 0; e < count; e += kAtOnce) {
      uint4 raw[kAtOnce];
      float by[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t row = __shfl_sync(~0u, index, e + i);
        by[i] = __shfl_sync(~0u, weight, e + i);
        raw[i] = inside && e + i < count ? __ldg(reinterpret_cast<const uint4*>(columns + row * stride)) : uint4{};
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
}

template <typename Out>
__global__ void __launch_bounds__(32 * kWarps)
    sum_kernel(const Entries entries, const __nv_bfloat16* matrix, int64_t stride, int rows, int sums, int width,
               const float* base, Out* out) {
  __shared__ float partial[kWarps][kSlice];
  __shared__ int many[kMostSums], how_many;  // sums of many entries, in any order
  if (are_passed(entries.limits)) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, start = blockIdx.y * kSlice, column = start + 8 * lane;
  const bool inside = column < width;
  // What is added to in place needs no visit where nothing is added.
  const bool in_place = static_cast<const void*>(base) == static_cast<const void*>(out);
  if (threadIdx.x == 0) how_many = 0;
  __syncthreads();

  const int each = (sums + kWarps - 1) / kWarps, before = blockIdx.x * sums + warp * each, mine = before + lane;
  const int after = min(min(before + each, static_cast<int>(blockIdx.x + 1) * sums), rows);
  const bool has_one = mine < after;
  const int64_t begin = has_one ? entries.starts[mine] : 0;
  const bool is_dense = begin >= static_cast<int64_t>(entries.limits.short_room) && !had_room(entries.limits);
  const int64_t end = has_one && !is_dense ? entries.ends[mine] : 0;
  for (int i = 0; before + i < after; ++i) {
    const int64_t first = __shfl_sync(~0u, begin, i), last = __shfl_sync(~0u, end, i);
    if (last - first > kFew) {
      if (lane == 0) many[atomicAdd(&how_many, 1)] = before + i;
      continue;
    }
    if (in_place && first >= last) continue;
    float sum[8] = {};
    add(entries, first, last, matrix + column, stride, inside, sum);
    if (!inside) continue;
    const int64_t at = int64_t(before + i) * width + column;
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[j] += base != nullptr ? base[at + j] : 0.0f;
    put_together(out + at, sum);
  }
  __syncthreads();

  for (int i = 0; i < how_many; ++i) {
    const int row = many[i];
    const int64_t first = entries.starts[row], last = entries.ends[row];
    const int64_t share = (last - first + kWarps - 1) / kWarps, from = first + warp * share;
    float sum[8] = {};
    add(entries, from, min(last, from + share), matrix + column, stride, inside, sum);
    put_together(&partial[warp][8 * lane], sum);
    __syncthreads();
    if (threadIdx.x < kSlice && start + threadIdx.x < width) {
      const int64_t at = int64_t(row) * width + start + threadIdx.x;
      float total = base != nullptr ? base[at] : 0.0f;
      for (int w = 0; w < kWarps; ++w) total += partial[w][threadIdx.x];
      out[at] = static_cast<Out>(total);
    }
    __syncthreads();
  }
}

}  // namespace

cudaError_t sum_of_rows(const Entries& entries, const Values& matrix, int64_t stride, int rows, int width,
                        const float* base, void* out, DType out_dtype, cudaStream_t stream) {
  const int slices = (width + kSlice - 1) / kSlice;
  const int sums = static_cast<int>(min(max(int64_t(rows) * slices / kBlocks, int64_t(1)), int64_t(kMostSums)));
  const dim3 grid((rows + sums - 1) / sums, slices);
  const auto* from = static_cast<const __nv_bfloat16*>(matrix.data);
  const auto launch = [&](auto* to) {
    sum_kernel<<<grid, 32 * kWarps, 0, stream>>>(entries, from, stride, rows, sums, width, base, to);
  };
  out_dtype == DType::kFloat32 ? launch(static_cast<float*>(out)) : launch(static_cast<__nv_bfloat16*>(out));
  return cudaGetLastError();
}

}  // namespace grpo_fast
