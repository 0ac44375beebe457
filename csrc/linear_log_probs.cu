// Log-probs of chosen tokens and entropy from hidden states: the logits of a matrix product that never leave registers.
//
// A block keeps 256 rows and walks over the vocabulary, 128 words at a time. In a block,
//
//   the loader     (one thread)       copies tiles of hidden states and of the head, 64 of the hidden size at a time,
//                                     into a ring in shared memory; the two blocks of a cluster have the same words,
//                                     and each copies half of them for both,
//   the consumers  (2 warpgroups)     multiply them on the tensor cores, 128 rows each, and at the end of 128 words
//   take
//                                     the logits in their registers into their rows' statistics.
//
// While one warpgroup is with its statistics the other multiplies, as far apart as the ring allows. Blocks that share
// rows have every n-th tile of words, so all blocks are near the same words at the same time, and the head is read from
// memory once. A second kernel merges what those blocks found.

#include <cuda.h>
#include <cuda_runtime.h>

#include "api.h"
#include "async.cuh"
#include "row.cuh"
#include "scalars.cuh"

namespace grpo_fast {
namespace {

constexpr int kRows = 256;   // of a block
constexpr int kWords = 128;  // of a tile
constexpr int kDepth =
    64;  // of the hidden size, in a stage of the ring: 128 bytes, which is what a tile's swizzle takes
constexpr int kStages = 4;
constexpr int kCluster = 2;
constexpr int kConsumers = 2;  // warpgroups, 128 rows each
constexpr int kThreads = 128 * (kConsumers + 1);
constexpr int kRowBytes = kRows * kDepth * 2, kWordBytes = kWords * kDepth * 2;
constexpr int kStageBytes = kRowBytes + kWordBytes;
constexpr int kSharedBytes = kStages * (kStageBytes + 2 * 8) + 1024;  // and what aligns it to the swizzle's period

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Far below kFloor, so that it adds nothing to a sum that has no other base yet, and finite.
constexpr float kNowhere = -1e32f;

// A matrix in shared memory as the tensor cores read it: rows of 128 bytes, swizzled in groups of eight.
__device__ inline uint64_t descriptor(const void* p) {
  return uint64_t(shared_address(p) >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

__device__ inline void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ inline void mma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define GRPO_FAST_F8(i)                                                                                       \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define GRPO_FAST_MMA(type)                                                                                        \
  asm volatile(                                                                                                    \
      "{\n"                                                                                                        \
      ".reg .pred add;\n"                                                                                          \
      "setp.ne.b32 add, %66, 0;\n"                                                                                 \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                                 \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "     \
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, "  \
      "%43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
      "%64, %65, add, 1, 1, 0, 0;\n"                                                                               \
      "}"                                                                                                          \
      : GRPO_FAST_F8(0), GRPO_FAST_F8(8), GRPO_FAST_F8(16), GRPO_FAST_F8(24), GRPO_FAST_F8(32), GRPO_FAST_F8(40),  \
        GRPO_FAST_F8(48), GRPO_FAST_F8(56)                                                                         \
      : "l"(a), "l"(b), "r"(add))

// d (64 x 128) = a b, or += if `add`.
__device__ inline void mma(float (&d)[64], uint64_t a, uint64_t b, int add, __nv_bfloat16) { GRPO_FAST_MMA("bf16"); }
__device__ inline void mma(float (&d)[64], uint64_t a, uint64_t b, int add, __half) { GRPO_FAST_MMA("f16"); }

#undef GRPO_FAST_MMA
#undef GRPO_FAST_F8

// Start copying a tile at (depth, row) of a matrix; `blocks` is the set of the cluster's that get it, at the same
// place.
__device__ inline void copy_tile(void* to, const CUtensorMap* map, int depth, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(depth), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

__device__ inline void copy_tile_to_all(void* to, const CUtensorMap* map, int depth, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, "
      "%3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(depth), "r"(row), "r"(shared_address(barrier)), "h"(uint16_t((1 << kCluster) - 1))
      : "memory");
}

// Arrive at the barrier in the same place of another block's shared memory.
__device__ inline void barrier_arrive_at(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

#endif

struct Problem {
  int count, V, H;
  int pairs, lanes;  // of 512 rows, and how many clusters share each
  Values ids;
  const float* bias;  // null for none
  LogitOptions options;
  float4* partials;  // (lanes, count) statistics
};

template <typename T, bool kSoftcap, bool kBias>
__global__ void __launch_bounds__(kThreads, 1)
    statistics_kernel(const __grid_constant__ CUtensorMap hidden, const __grid_constant__ CUtensorMap weight,
                      const Problem problem) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char memory[];
  char* const stages = memory + (-shared_address(memory) & 1023);
  uint64_t* const full = reinterpret_cast<uint64_t*>(stages + kStages * kStageBytes);
  uint64_t* const empty = full + kStages;
  const uint32_t rank = cluster_rank();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&full[i], 1);
      barrier_init(&empty[i], kConsumers * kCluster);
    }
    barrier_init_fence();
  }
  cluster_sync();

  const int group = threadIdx.x / 128, clusters = gridDim.x / kCluster;
  const int tiles = (problem.V + kWords - 1) / kWords, steps = (problem.H + kDepth - 1) / kDepth;
  Ring ring;
  if (group == kConsumers) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x % 128 == 0) {
      for (int item = blockIdx.x / kCluster; item < problem.pairs * problem.lanes; item += clusters) {
        const int row = (item % problem.pairs * kCluster + static_cast<int>(rank)) * kRows;
        for (int tile = item / problem.pairs; tile < tiles; tile += problem.lanes) {
          const int word = tile * kWords + static_cast<int>(rank) * (kWords / kCluster);
          for (int step = 0; step < steps; ++step, ring.next()) {
            char* const stage = stages + ring.stage * kStageBytes;
            barrier_wait_for_cluster(&empty[ring.stage], ring.parity ^ 1);
            barrier_arrive_expect(&full[ring.stage], kStageBytes);
            copy_tile(stage, &hidden, step * kDepth, row, &full[ring.stage]);
            copy_tile_to_all(stage + kRowBytes + static_cast<int>(rank) * (kWordBytes / kCluster), &weight,
                             step * kDepth, word, &full[ring.stage]);
          }
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const LogitOptions options = problem.options;
    const float inner = options.slope * kLog2e;
    const int thread = threadIdx.x % 128, lane = thread % 32;
    const int first_row = group * 128 + thread / 32 * 16 + lane / 4;  // this thread's rows: + 0, 8, 64, 72
    const int first_word = lane % 4 * 2;                              // its words: + 0, 1, 8, 9, 16, ...
    const auto release = [&](int stage) {
      if (thread < kCluster) barrier_arrive_at(&empty[stage], thread);
    };
    for (int item = blockIdx.x / kCluster; item < problem.pairs * problem.lanes; item += clusters) {
      const int row = (item % problem.pairs * kCluster + static_cast<int>(rank)) * kRows + first_row;
      Statistics rows[2][2];
      int64_t ids[2][2];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int n = row + m * 64 + h * 8;
          ids[m][h] = n < problem.count ? integer(problem.ids, n) : -1;
        }
      }
      for (int tile = item / problem.pairs; tile < tiles; tile += problem.lanes) {
        float logits[2][64];
        int previous = -1;
        for (int step = 0; step < steps; ++step, ring.next()) {
          const char* const stage = stages + ring.stage * kStageBytes;
          barrier_wait(&full[ring.stage], ring.parity);
          mma_fence();
#pragma unroll
          for (int k = 0; k < kDepth / 16; ++k) {
            const uint64_t b = descriptor(stage + kRowBytes + k * 32);
#pragma unroll
            for (int m = 0; m < 2; ++m) {
              mma(logits[m], descriptor(stage + (group * 128 + m * 64) * 128 + k * 32), b, step + k > 0, T());
            }
          }
          mma_commit();
          if (previous >= 0) {
            mma_wait<1>();
            release(previous);
          }
          previous = ring.stage;
        }
        mma_wait<0>();
        release(previous);

        // Statistics. logits[m][8 j + 2 h + e ...]: pairs e of row h of a group of eight words j, as the units lay
        // them.
        const int word = tile * kWords + first_word;
        const bool whole = tile * kWords + kWords <= problem.V;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float u[32];
#pragma unroll
            for (int j = 0; j < 16; ++j) {
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                float x = logits[m][4 * j + 2 * h + e];
                const int column = word + 8 * j + e;
                if (kBias) x += whole || column < problem.V ? problem.bias[column] : 0.0f;
                u[2 * j + e] = capped<kSoftcap>(x, options);
              }
            }
            if (!whole) {
#pragma unroll
              for (int i = 0; i < 32; ++i) {
                if (word + i / 2 * 8 + i % 2 >= problem.V) u[i] = kNowhere;
              }
            }
            const int64_t place = ids[m][h] - tile * kWords;
            if (place >= 0 && place < kWords && place % 8 / 2 * 2 == first_word) {
              const int at = static_cast<int>(place / 8 * 2 + place % 2);
#pragma unroll
              for (int i = 0; i < 32; ++i) {
                if (i == at) rows[m][h].target = u[i], u[i] = kNowhere;
              }
            }
            float top = u[0];
#pragma unroll
            for (int i = 1; i < 32; ++i) top = fmaxf(top, u[i]);
            rows[m][h].reach(top, inner);
            rows[m][h].template add<!kBias>(u, inner);
          }
        }
      }
      // Four threads have a row.
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          Statistics& mine = rows[m][h];
          for (int across = 1; across < 4; across *= 2) {
            mine.merge({__shfl_xor_sync(~0u, mine.base, across), __shfl_xor_sync(~0u, mine.sum, across),
                        __shfl_xor_sync(~0u, mine.weighted, across), __shfl_xor_sync(~0u, mine.target, across)},
                       inner);
          }
          const int n = row + m * 64 + h * 8;
          if (lane % 4 == 0 && n < problem.count) {
            problem.partials[int64_t(item / problem.pairs) * problem.count + n] =
                make_float4(mine.base, mine.sum, mine.weighted, mine.target);
          }
        }
      }
    }
  }
  cluster_sync();  // a block that is gone cannot be written to or arrived at
#endif
}

__global__ void merge_kernel(const Problem problem, const LogProbs results) {
  const int n = blockIdx.x * blockDim.x + threadIdx.x;
  if (n >= problem.count) return;
  const float inner = problem.options.slope * kLog2e;
  Statistics rest;
  for (int lane = 0; lane < problem.lanes; ++lane) {
    const float4 part = problem.partials[int64_t(lane) * problem.count + n];
    rest.merge({part.x, part.y, part.z, part.w}, inner);
  }
  const int64_t id = integer(problem.ids, n);
  const Softmax row = Softmax::from(rest, id >= 0 && id < problem.V, problem.options);
  results.logps[n] = row.logp;
  results.shifts[n] = row.shift;
  results.totals[n] = row.total;
  if (results.entropies != nullptr) results.entropies[n] = row.entropy;
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found through the runtime so that nothing links to the driver.
cudaError_t find_encode(Encode* encode) {
  cudaDriverEntryPointQueryResult found;
  void* address = nullptr;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &address, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &address, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  *encode = reinterpret_cast<Encode>(address);
  return cudaSuccess;
}

// A matrix (rows, depth) of 2-byte elements, `stride` elements from row to row, to be copied in tiles of so many rows.
cudaError_t describe(CUtensorMap* map, Encode encode, DType dtype, const void* data, int rows, int depth,
                     int64_t stride, int tile_rows) {
  const cuuint64_t sizes[2] = {cuuint64_t(depth), cuuint64_t(rows)}, strides[1] = {cuuint64_t(stride) * 2};
  const cuuint32_t box[2] = {kDepth, cuuint32_t(tile_rows)}, steps[2] = {1, 1};
  const auto type = dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result =
      encode(map, type, 2, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <typename T>
cudaError_t launch(const CUtensorMap& hidden, const CUtensorMap& weight, const Problem& problem, int blocks,
                   cudaStream_t stream) {
  const bool softcap = problem.options.has_softcap, bias = problem.bias != nullptr;
  const auto kernel = softcap ? (bias ? statistics_kernel<T, true, true> : statistics_kernel<T, true, false>)
                              : (bias ? statistics_kernel<T, false, true> : statistics_kernel<T, false, false>);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, hidden, weight, problem);
}

}  // namespace

int linear_log_probs_lanes(int count, int multiprocessors) {
  const int pairs = (count + kCluster * kRows - 1) / (kCluster * kRows), clusters = multiprocessors / kCluster;
  // Every cluster has so many shares of the words; the fewest rounds, in units of a whole one, are best.
  int best = 1;
  double least = 1e30;
  for (int lanes = 1; lanes <= clusters; ++lanes) {
    const double rounds = double((pairs * lanes + clusters - 1) / clusters) / lanes;
    if (rounds < least - 1e-9) best = lanes, least = rounds;
  }
  return best;
}

cudaError_t linear_log_probs(const Values& hidden, int64_t hidden_stride, const Values& weight, int64_t weight_stride,
                             int count, int V, int H, const Values& ids, const float* bias, const LogitOptions& options,
                             int lanes, int multiprocessors, float4* partials, const LogProbs& results,
                             cudaStream_t stream) {
  Encode encode;
  cudaError_t error = find_encode(&encode);
  if (error != cudaSuccess) return error;
  CUtensorMap hidden_map, weight_map;
  error = describe(&hidden_map, encode, hidden.dtype, hidden.data, count, H, hidden_stride, kRows);
  if (error != cudaSuccess) return error;
  error = describe(&weight_map, encode, weight.dtype, weight.data, V, H, weight_stride, kWords / kCluster);
  if (error != cudaSuccess) return error;
  const int pairs = (count + kCluster * kRows - 1) / (kCluster * kRows);
  const Problem problem = {count, V, H, pairs, lanes, ids, bias, options, partials};
  const int items = pairs * lanes, clusters = multiprocessors / kCluster;
  const int blocks = kCluster * (items < clusters ? items : clusters);
  error = hidden.dtype == DType::kBFloat16 ? launch<__nv_bfloat16>(hidden_map, weight_map, problem, blocks, stream)
                                           : launch<__half>(hidden_map, weight_map, problem, blocks, stream);
  if (error != cudaSuccess) return error;
  merge_kernel<<<(count + 127) / 128, 128, 0, stream>>>(problem, results);
  return cudaGetLastError();
}

}  // namespace grpo_fast
