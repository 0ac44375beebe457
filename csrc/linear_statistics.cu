// Rows of logits from hidden states, as a matrix product whose logits never leave the registers: their statistics, or,
// where these are known, their gradient.
//
// A block keeps 128 rows and walks over the vocabulary, 256 words at a time. In a block,
//
//   the loader     (one thread)       copies tiles of hidden states and of the head, 64 of the hidden size at a time,
//                                     into a ring in shared memory; the two blocks of a cluster have the same words,
//                                     and each copies half of them for both,
//   the consumers  (2 warpgroups)     multiply them on the tensor cores, 64 rows each, and at the end of 256 words
//                                     take the logits in their registers into their rows' statistics. Where there is
//                                     to be a gradient they write the exponentials that they have then, in 16 bits.
//                                     Where a row's sum is known from before they write the gradient itself,
//   the converters (3 warps)          turn exponentials of other rows, whose sums are known, into their gradient: that
//                                     is bound by memory, which the product hardly uses. They are the rest of the
//                                     loader's warpgroup. At the end the consumers join them.
//
// While one warpgroup is with its statistics the other multiplies, as far apart as the ring allows. Clusters that share
// rows have every n-th tile of words; linear_rows.cu merges what they found. How many do follows from the number of
// rows, which the host need not know.

#include <cuda.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "api.h"
#include "async.cuh"
#include "conversion.cuh"
#include "head.cuh"
#include "row.cuh"
#include "scalars.cuh"
#include "wgmma.cuh"

namespace grpo_fast {
namespace {

constexpr int kRows = 128;  // of a block
constexpr int kWords = kTileWords;
constexpr int kDepth = 64;  // of the hidden size, in a stage of the ring: 128 bytes, the width of a tile's swizzle
constexpr int kStages = 4;
constexpr int kCluster = 2;
constexpr uint16_t kAllBlocks = (1 << kCluster) - 1;
constexpr int kBand = kBandRows / (kCluster * kRows);  // in pairs of blocks
constexpr int kConsumers = 2;                          // warpgroups, 64 rows each
constexpr int kThreads = 128 * (kConsumers + 1);
constexpr int kRowBytes = kRows * kDepth * 2, kWordBytes = kWords * kDepth * 2;
constexpr int kStageBytes = kRowBytes + kWordBytes;
constexpr int kSharedBytes = kStages * (kStageBytes + 2 * 8) + 1024;  // and what aligns it to the swizzle's period
constexpr int kVectorsASlice = 1024;                                  // of what a warp converts at a time

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Far below kFloor, so that it adds nothing to a sum that has no other base yet, and finite.
constexpr float kNowhere = -1e32f;

struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

#endif

struct Item {
  int pair, lane;
};

// What the product leaves: statistics; exponentials besides; the gradient alone, that of entropies too if it is tilted.
enum class Makes { kStatistics, kExponentials, kGradient, kTiltedGradient };

struct Problem {
  Head head;
  Exponentials exponentials;  // their place is that of the gradient too
  const Slopes* slopes;       // (count,), of the gradient
  Partials partials;
  Conversion meanwhile;  // of no rows if there is nothing to convert
  int* next_slice;       // of its slices, the first that no warp has taken
};

__host__ __device__ inline int pairs_of(int rows) { return (rows + kCluster * kRows - 1) / (kCluster * kRows); }

// How many clusters share the rows of a pair of blocks: the fewest with which all have as many shares.
__host__ __device__ inline int lanes_of(int pairs, int clusters) {
  int divisor = clusters;
  for (int rest = pairs; rest != 0;) {
    const int next = divisor % rest;
    divisor = rest, rest = next;
  }
  return clusters / divisor;
}

// Items in an order in which those near each other share rows as well as words: a band of pairs at a time.
__device__ inline Item item_of(int i, int pairs, int lanes) {
  const int band = i / (kBand * lanes), first = band * kBand;
  const int width = min(kBand, pairs - first);
  i -= first * lanes;
  return {first + i % width, i / width};
}

// A warp takes slices of another product's rows until there are no more.
__device__ inline void convert_slices(const Conversion& all, int* next_slice) {
  const Slices<kVectorsASlice> slices(all.head, all.exponentials);
  const int in_a_row = slices.count(), total = all.head.count * in_a_row, lane = threadIdx.x % 32;
  if (total == 0) return;
  const auto take = [&] { return lane == 0 ? atomicAdd(next_slice, 1) : 0; };
  for (int i = __shfl_sync(~0u, take(), 0); i < total;) {
    const int following = take();  // in the first lane, and there when it is needed
    const RowConversion row(all, i / in_a_row);
    const SliceOfRow slice = slices[i % in_a_row];
    if (row.far()) {
      row.project(slice, 0, 1);
    } else {
      for (int vector = slice.first + lane; vector < slice.end; vector += 32 * kVectorsAThread) {
        if (all.tilted) {
          row.convert<true, 32>(slice, vector);
        } else {
          row.convert<false, 32>(slice, vector);
        }
      }
    }
    i = __shfl_sync(~0u, following, 0);
  }
}

template <typename T, bool kSoftcap, bool kBias, Makes kMakes>
__global__ void __launch_bounds__(kThreads, 1)
    product_kernel(const __grid_constant__ CUtensorMap hidden, const __grid_constant__ CUtensorMap weight,
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

  const int group = threadIdx.x / 128;
  const Head& head = problem.head;
  const int count = rows_of(head), in_all = pairs_of(count);
  const int clusters = gridDim.x / kCluster, lanes = lanes_of(in_all, clusters), items = in_all * lanes;
  if (problem.partials.lanes != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *problem.partials.lanes = lanes;
  const int tiles = (head.V + kWords - 1) / kWords, steps = (head.H + kDepth - 1) / kDepth;
  Ring ring;
  if (group == kConsumers) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x % 128 == 0) {
      for (int item = blockIdx.x / kCluster; item < items; item += clusters) {
        const Item at = item_of(item, in_all, lanes);
        const int row = (at.pair * kCluster + static_cast<int>(rank)) * kRows;
        for (int tile = at.lane; tile < tiles; tile += lanes) {
          const int word = tile * kWords + static_cast<int>(rank) * (kWords / kCluster);
          for (int step = 0; step < steps; ++step, ring.next()) {
            char* const stage = stages + ring.stage * kStageBytes;
            barrier_wait(&empty[ring.stage], ring.parity ^ 1);
            barrier_arrive_expect(&full[ring.stage], kStageBytes);
            copy_tile(stage, &hidden, step * kDepth, row, &full[ring.stage]);
            copy_tile_to_blocks(stage + kRowBytes + static_cast<int>(rank) * (kWordBytes / kCluster), &weight,
                                step * kDepth, word, &full[ring.stage], kAllBlocks);
          }
        }
      }
    } else if (kMakes == Makes::kExponentials && threadIdx.x % 128 >= 32) {
      convert_slices(problem.meanwhile, problem.next_slice);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    constexpr bool kKeep = kMakes == Makes::kExponentials, kTilt = kMakes == Makes::kTiltedGradient;
    constexpr bool kGradient = kTilt || kMakes == Makes::kGradient;
    const LogitOptions options = head.options;
    const float inner = options.slope * kLog2e;
    const int thread = threadIdx.x % 128, lane = thread % 32;
    const int first_row = group * 64 + thread / 32 * 16 + lane / 4;  // this thread's rows: + 0, 8
    const int first_word = lane % 4 * 2;                             // its words: + 0, 1, 8, 9, 16, ...
    const auto release = [&](int stage) {
      if (thread < kCluster) barrier_arrive_at(&empty[stage], thread);
    };
    for (int item = blockIdx.x / kCluster; item < items; item += clusters) {
      const Item at = item_of(item, in_all, lanes);
      const int row = (at.pair * kCluster + static_cast<int>(rank)) * kRows + first_row;
      Statistics rows[2];
      int64_t ids[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) ids[h] = row + 8 * h < count ? integer(head.ids, row + 8 * h) : -1;
      float bases[2] = {};
      if (kKeep) {
#pragma unroll
        for (int h = 0; h < 2; ++h) bases[h] = row + 8 * h < count ? problem.exponentials.bases[row + 8 * h] : 0.0f;
      }
      for (int tile = at.lane; tile < tiles; tile += lanes) {
        float logits[128];
        int previous = -1;
        for (int step = 0; step < steps; ++step, ring.next()) {
          const char* const stage = stages + ring.stage * kStageBytes;
          barrier_wait(&full[ring.stage], ring.parity);
          mma_fence();
#pragma unroll
          for (int k = 0; k < kDepth / 16; ++k) {
            mma(logits, descriptor(stage + group * 64 * 128 + k * 32), descriptor(stage + kRowBytes + k * 32),
                step + k > 0, T());
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

        // logits[4 j + 2 h + e]: pairs e of row h of a group of eight words j, as the units lay them.
        const int word = tile * kWords + first_word;
        const bool whole = tile * kWords + kWords <= head.V;
#pragma unroll
        for (int part = 0; part < 4; ++part) {  // 128 words of a row, for registers' sake
          const int h = part / 2, first = word + part % 2 * 128;
          float u[32];
#pragma unroll
          for (int i = 0; i < 32; ++i) {
            float x = logits[part % 2 * 64 + i / 2 * 4 + 2 * h + i % 2];
            const int column = first + i / 2 * 8 + i % 2;
            if (kBias) x += whole || column < head.V ? head.bias[column] : 0.0f;
            u[i] = capped<kSoftcap>(x, options);
          }
          if (!whole) {
#pragma unroll
            for (int i = 0; i < 32; ++i) {
              if (first + i / 2 * 8 + i % 2 >= head.V) u[i] = kNowhere;
            }
          }
          const int64_t place = ids[h] >= first ? ids[h] - first : -1;
          const bool here = place >= 0 && place < 128 && place % 8 < 2;
          const int which = here ? static_cast<int>(place / 8 * 2 + place % 8) : -1;
          if (kGradient) {
            Slopes slopes = row + 8 * h < count ? problem.slopes[row + 8 * h] : Slopes{};
            if (slopes.zero()) slopes.shift = -kFloor;  // 0 times an exponential shall be 0, whatever the logits are
#pragma unroll
            for (int i = 0; i < 32; ++i) {
              u[i] = i == which ? slopes.template of_target<kSoftcap>(u[i], options)
                                : slopes.template at<kSoftcap, kTilt>(u[i], inner, options);
            }
          } else {
            if (here) {
#pragma unroll
              for (int i = 0; i < 32; ++i) {
                if (i == which) rows[h].target = u[i], u[i] = kNowhere;
              }
            }
            float top = u[0];
#pragma unroll
            for (int i = 1; i < 32; ++i) top = fmaxf(top, u[i]);
            rows[h].reach(top, inner);
            rows[h].template exponentiate<!kBias>(u, inner);
          }
          if (kKeep || kGradient) {
            const float factor = kKeep ? exp2_fast(Statistics::shift(rows[h].base, inner) - bases[h]) : 1.0f;
            uint32_t pairs[16];
#pragma unroll
            for (int i = 0; i < 16; ++i) {
              pairs[i] = kKeep ? pack_exponentials(u[2 * i] * factor, u[2 * i + 1] * factor)
                               : pack_bfloat16(u[2 * i], u[2 * i + 1]);
            }
            const int start = tile * kWords + part % 2 * 128 + lane % 4 * 8;
            uint16_t* to = place_of(problem.exponentials, row + 8 * h, start);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const uint4 group = gather_groups(pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]);
              if (row + 8 * h < count && start + 32 * i < head.V) {
                __stcs(reinterpret_cast<uint4*>(to + 32 * i), group);
              }
            }
          }
        }
      }
      // Four threads have a row.
#pragma unroll
      for (int h = 0; h < 2 && !kGradient; ++h) {
        Statistics& mine = rows[h];
        for (int across = 1; across < 4; across *= 2) {
          mine.merge({__shfl_xor_sync(~0u, mine.base, across), __shfl_xor_sync(~0u, mine.sum, across),
                      __shfl_xor_sync(~0u, mine.weighted, across), __shfl_xor_sync(~0u, mine.target, across)},
                     inner);
        }
        const int n = row + 8 * h;
        if (lane % 4 == 0 && n < count) {
          problem.partials.values[int64_t(at.lane) * problem.partials.stride + n] =
              make_float4(mine.base, mine.sum, mine.weighted, mine.target);
        }
      }
    }
    if (kKeep) convert_slices(problem.meanwhile, problem.next_slice);
  }
  cluster_sync();  // a block that is gone cannot be written to or arrived at
#endif
}

// The base of each row's exponentials, by the logit of its sampled token: a warp a row. And nothing is converted yet.
template <typename T>
__global__ void base_kernel(const Head head, float* bases, int* next_slice) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *next_slice = 0;
  const int n = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (n >= rows_of(head)) return;
  const int64_t id = integer(head.ids, n);
  float base = kLowestBase;
  if (id >= 0 && id < head.V) {
    float u = logit<T>(head, n, static_cast<int>(id), lane, 32);
    for (int across = 16; across > 0; across /= 2) u += __shfl_xor_sync(~0u, u, across);
    base = fmaxf(u * head.options.slope * kLog2e, kLowestBase);
  }
  if (lane == 0) bases[n] = base + kHeadroom;
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
cudaError_t describe(CUtensorMap* map, Encode encode, const Values& matrix, int rows, int depth, int64_t stride,
                     int tile_rows) {
  const cuuint64_t sizes[2] = {cuuint64_t(depth), cuuint64_t(rows)}, strides[1] = {cuuint64_t(stride) * 2};
  const cuuint32_t box[2] = {kDepth, cuuint32_t(tile_rows)}, steps[2] = {1, 1};
  const auto type =
      matrix.dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result =
      encode(map, type, 2, const_cast<void*>(matrix.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <typename T>
auto* choose_kernel(const Problem& problem) {
  constexpr Makes kMakes = Makes::kStatistics;
  const bool softcap = problem.head.options.has_softcap, bias = problem.head.bias != nullptr;
  if (problem.exponentials.first.values != nullptr) {
    return bias ? product_kernel<__nv_bfloat16, false, true, Makes::kExponentials>
                : product_kernel<__nv_bfloat16, false, false, Makes::kExponentials>;
  }
  return softcap ? (bias ? product_kernel<T, true, true, kMakes> : product_kernel<T, true, false, kMakes>)
                 : (bias ? product_kernel<T, false, true, kMakes> : product_kernel<T, false, false, kMakes>);
}

template <Makes kMakes>
auto* choose_gradient_kernel(const Head& head) {
  using T = __nv_bfloat16;
  const bool softcap = head.options.has_softcap, bias = head.bias != nullptr;
  return softcap ? (bias ? product_kernel<T, true, true, kMakes> : product_kernel<T, true, false, kMakes>)
                 : (bias ? product_kernel<T, false, true, kMakes> : product_kernel<T, false, false, kMakes>);
}

template <typename Kernel>
cudaError_t launch(Kernel* kernel, const CUtensorMap& hidden, const CUtensorMap& weight, const Problem& problem,
                   cudaStream_t stream) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = problem.head.multiprocessors / kCluster * kCluster;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, hidden, weight, problem);
}

template <typename T>
cudaError_t statistics(const CUtensorMap& hidden, const CUtensorMap& weight, const Problem& problem,
                       cudaStream_t stream) {
  if (problem.exponentials.first.values != nullptr) {
    if (std::is_same_v<T, __half> || problem.head.options.has_softcap) return cudaErrorInvalidValue;
    constexpr int kRowsABlock = 8;
    base_kernel<T><<<(problem.head.count + kRowsABlock - 1) / kRowsABlock, 32 * kRowsABlock, 0, stream>>>(
        problem.head, problem.exponentials.bases, problem.next_slice);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return launch(choose_kernel<T>(problem), hidden, weight, problem, stream);
}

cudaError_t describe_head(CUtensorMap* hidden, CUtensorMap* weight, const Head& head) {
  Encode encode;
  cudaError_t error = find_encode(&encode);
  if (error != cudaSuccess) return error;
  error = describe(hidden, encode, head.hidden, head.count, head.H, head.hidden_stride, kRows);
  if (error != cudaSuccess) return error;
  return describe(weight, encode, head.weight, head.V, head.H, head.weight_stride, kWords / kCluster);
}

}  // namespace

int linear_lanes(int count, int multiprocessors) { return lanes_of(pairs_of(count), multiprocessors / kCluster); }

int linear_lanes_at_most(int multiprocessors) { return multiprocessors / kCluster; }

cudaError_t linear_product(const Head& head, const Exponentials& exponentials, const Partials& partials,
                           const Conversion* meanwhile, int* next_slice, cudaStream_t stream) {
  CUtensorMap hidden, weight;
  const cudaError_t error = describe_head(&hidden, &weight, head);
  if (error != cudaSuccess) return error;
  Problem problem = {head, exponentials, nullptr, partials, {}, next_slice};
  if (meanwhile != nullptr) problem.meanwhile = *meanwhile;
  return head.hidden.dtype == DType::kBFloat16 ? statistics<__nv_bfloat16>(hidden, weight, problem, stream)
                                               : statistics<__half>(hidden, weight, problem, stream);
}

cudaError_t linear_gradient_by_product(const Head& head, const Exponentials& place, const float4* slopes, bool tilted,
                                       cudaStream_t stream) {
  if (head.hidden.dtype != DType::kBFloat16) return cudaErrorInvalidValue;
  CUtensorMap hidden, weight;
  const cudaError_t error = describe_head(&hidden, &weight, head);
  if (error != cudaSuccess) return error;
  const Problem problem = {head, place, reinterpret_cast<const Slopes*>(slopes), {}, {}, nullptr};
  return launch(
      tilted ? choose_gradient_kernel<Makes::kTiltedGradient>(head) : choose_gradient_kernel<Makes::kGradient>(head),
      hidden, weight, problem, stream);
}

}  // namespace grpo_fast
