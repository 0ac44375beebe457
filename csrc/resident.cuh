// Rows that stay on the chip from their statistics to their gradient.
//
// A cluster of blocks shares a row, each block a slice of it. In a block,
//
//   the loader        (one lane)    copies slice after slice into a ring of chunks in shared memory,
//   the consumers     (most warps)  sum a slice's statistics, wait for the row's slopes, and write its gradient,
//   the accountant    (one warp)    merges the statistics of the whole cluster into the row's softmax and has the op
//                                   turn that into slopes and results.
//
// The consumers of every block send their sums straight into the shared memory of every block of the cluster, so that
// a row costs one hop between blocks and no barrier of the cluster. A chunk goes back to the loader as soon as its
// gradient is in registers, and the next row moves in behind the one at work. Logits are read from memory once and
// the gradient is written once.
//
// Rows need not begin at a multiple of 16 bytes, which is what the copy engine takes: up to 7 logits before the first
// such place and up to 7 after the last are the edges, one a thread, read and written directly.

#pragma once

#include <cuda_runtime.h>

#include "api.h"
#include "async.cuh"
#include "row.cuh"
#include "scalars.cuh"

namespace grpo_fast {

constexpr int kVectors = 2;  // 16-byte vectors that a consumer takes from a chunk
constexpr int kMaxThreads = 32 * (kMaxConsumers + 2);
constexpr int kEdge = 8;  // threads for the edge at either end

__host__ __device__ inline int bytes_of_chunk(const Layout& layout) { return layout.consumers * 32 * kVectors * 16; }

__host__ __device__ inline int bytes_of_block(const Layout& layout) {
  const int statistics = 2 * layout.cluster * layout.consumers * sizeof(float4);
  return layout.stages * (bytes_of_chunk(layout) + 2 * 8) + statistics + sizeof(Slopes) + 3 * 8;
}

// A block's part of a row.
struct Slice {
  int64_t row;         // offset of the row's first logit
  int head, tail;      // logits before the first vector, and from where on after the last
  int first, vectors;  // of this block

  template <typename T>
  __device__ static Slice of(const Rows& rows, int n, int rank, int ranks) {
    Slice s;
    s.row = n / rows.T * rows.stride_b + n % rows.T * rows.stride_t;
    const auto address = reinterpret_cast<uintptr_t>(static_cast<const T*>(rows.logits) + s.row);
    s.head = min(static_cast<int>(-address % 16 / sizeof(T)), rows.V);
    const int all = (rows.V - s.head) / Vector<T>::kSize;
    s.tail = s.head + all * Vector<T>::kSize;
    const int share = (all + ranks - 1) / ranks;
    s.first = min(rank * share, all);
    s.vectors = min(share, all - s.first);
    return s;
  }

  // Whether all of it stays in the ring until its gradient is written. Longer slices are streamed twice.
  __device__ bool stays(const Layout& layout) const {
    return vectors <= layout.stages * layout.consumers * 32 * kVectors;
  }

  // The column of the edge that this thread holds, or -1: the head's are the first block's, the tail's the last's.
  __device__ int edge(int thread, int rank, int ranks, int V) const {
    if (rank == 0 && thread < head) return thread;
    const int column = tail + thread - kEdge;
    return rank == ranks - 1 && thread >= kEdge && column < V ? column : -1;
  }
};

// Where a role is in the ring.
struct Ring {
  int stages;
  int stage = 0;
  uint32_t parity = 0;

  __device__ void next() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

struct Shared {
  char* chunks;
  float4* statistics;  // (2, cluster, consumers)
  Slopes* slopes;
  uint64_t *full, *empty;  // a chunk each
  uint64_t* summed;        // 2: a row's statistics are there; rows alternate
  uint64_t* ready;         // its slopes are

  __device__ Shared(char* memory, const Layout& layout) {
    chunks = memory;
    statistics = reinterpret_cast<float4*>(chunks + layout.stages * bytes_of_chunk(layout));
    slopes = reinterpret_cast<Slopes*>(statistics + 2 * layout.cluster * layout.consumers);
    full = reinterpret_cast<uint64_t*>(slopes + 1);
    empty = full + layout.stages;
    summed = empty + layout.stages;
    ready = summed + 2;
  }
};

#if __CUDA_ARCH__ >= 900

// Whether a row is kept, asked for a row ahead of its use.
struct Kept {
  const Rows& rows;
  bool next;

  __device__ Kept(const Rows& rows, int n) : rows(rows), next(at(n)) {}
  __device__ bool at(int n) const { return n < rows.count && (rows.kept == nullptr || rows.kept[n] != 0); }
  __device__ bool advance(int following) {
    const bool now = next;
    next = at(following);
    return now;
  }
};

template <typename In, bool kGradient>
__device__ void load_slices(const Rows& rows, const Layout& layout, const Shared& shared, int rank, int n, int step) {
  // Nothing reads these bytes from L2 again. But what L2 throws out is then the gradient, soon and in the order in
  // which it was written, which the memory takes best: 1.24 ms where loads that go first themselves cost 1.37.
  const uint64_t policy = evict_last_policy();
  const int bytes = bytes_of_chunk(layout);
  Ring ring{layout.stages};
  Kept kept(rows, n);
  for (; n < rows.count; n += step) {
    if (!kept.advance(n + step)) continue;
    const Slice slice = Slice::of<In>(rows, n, rank, layout.cluster);
    const char* begin = reinterpret_cast<const char*>(static_cast<const In*>(rows.logits) + slice.row + slice.head) +
                        int64_t(slice.first) * 16;
    for (int pass = 0; pass < (kGradient && !slice.stays(layout) ? 2 : 1); ++pass) {
      const char* from = begin;
      for (int64_t left = int64_t(slice.vectors) * 16; left > 0; left -= bytes, from += bytes, ring.next()) {
        const int size = static_cast<int>(min(left, int64_t(bytes)));
        barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
        fence_before_copy();
        barrier_arrive_expect(&shared.full[ring.stage], size);
        copy_to_shared(shared.chunks + ring.stage * bytes, from, size, &shared.full[ring.stage], policy);
      }
    }
  }
}

template <typename Op>
__device__ void account(const Rows& rows, const Op& op, const Layout& layout, const Shared& shared, int rank, int n,
                        int step) {
  const int lane = threadIdx.x % 32;
  const int entries = layout.cluster * layout.consumers;
  const float inner = rows.options.slope * kLog2e;
  Kept kept(rows, n);
  int turn = 0;
  for (; n < rows.count; n += step) {
    if (!kept.advance(n + step)) {
      if (rank == 0 && lane == 0) op.skip(n);
      continue;
    }
    const typename Op::Inputs inputs = op.load(n);  // on its way while the row is summed
    const int64_t target = integer(rows.ids, n);
    const int half = turn % 2;
    if (layout.cluster == 1) {
      barrier_wait(&shared.summed[half], turn / 2 % 2);
    } else {
      barrier_wait_for_cluster(&shared.summed[half], turn / 2 % 2);
      if (lane == 0) barrier_arrive_expect(&shared.summed[half], entries * 16);  // for the row after the next
    }
    Statistics rest;
    for (int i = lane; i < entries; i += 32) {
      const float4 sent = shared.statistics[half * entries + i];
      rest.merge({sent.x, sent.y, sent.z, sent.w}, inner);
    }
    rest.merge_warp(inner);
    const Softmax row = Softmax::from(rest, target >= 0 && target < rows.V, rows.options);
    const typename Op::Result result = op.evaluate(inputs, row);
    const Slopes slopes = Slopes::from(row, result.d_logp, result.d_entropy, rows.options);
    if (lane == 0) *shared.slopes = slopes;
    barrier_arrive(shared.ready);
    if (rank == 0 && lane == 0) op.store(n, row, result);
    ++turn;
  }
}

template <typename In, typename Out, bool kSoftcap, bool kGradient, bool kTilt>
__device__ void consume(const Rows& rows, const Layout& layout, const Shared& shared, int rank, int n, int step) {
  constexpr int kSize = Vector<In>::kSize;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int threads = layout.consumers * 32, in_chunk = threads * kVectors;
  const LogitOptions options = rows.options;
  const float inner = options.slope * kLog2e;
  Ring ring{layout.stages};
  Kept kept(rows, n);
  int64_t next_id = n < rows.count ? integer(rows.ids, n) : 0;
  int turn = 0;

  // This thread's vectors of a chunk, which begins at the slice's `first`; -inf beyond its end. Whether none are.
  const auto load_chunk = [&](const Ring& at, int first, int vectors, uint4(&raw)[kVectors]) {
    const uint4* source = reinterpret_cast<const uint4*>(shared.chunks + at.stage * bytes_of_chunk(layout)) + thread;
    const bool whole = first + in_chunk <= vectors;
    if (whole) {
#pragma unroll
      for (int j = 0; j < kVectors; ++j) raw[j] = source[j * threads];
    } else {
      const uint32_t infinity = minus_infinity(In()), fill = sizeof(In) == 4 ? infinity : infinity << 16 | infinity;
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        raw[j] = {fill, fill, fill, fill};
        if (first + j * threads + thread < vectors) raw[j] = source[j * threads];
      }
    }
    return whole;
  };
  const auto write_zeros = [](Out* to) {
    const float zeros[kSize] = {};
    lies_together<Out, kSize>(to) ? store_together(to, zeros) : store_apart(to, zeros);
  };
  const auto release = [&](const Ring& at) { barrier_arrive(&shared.empty[at.stage]); };

  for (; n < rows.count; n += step) {
    const int64_t id = next_id;
    if (n + step < rows.count) next_id = integer(rows.ids, n + step);
    const Slice slice = Slice::of<In>(rows, n, rank, layout.cluster);
    const In* row = static_cast<const In*>(rows.logits) + slice.row;
    Out* out = static_cast<Out*>(rows.out) + n / rows.T * rows.out_stride_b + n % rows.T * rows.out_stride_t;
    Out* body = out + slice.head + int64_t(slice.first) * kSize;
    const int edge = slice.edge(thread, rank, layout.cluster, rows.V);
    const bool keep = kept.advance(n + step);

    if (!keep) {
      if (kGradient) {
        for (int64_t i = thread; i < slice.vectors; i += threads) write_zeros(body + i * kSize);
        if (edge >= 0) store(out + edge, 0.0f);
      }
      continue;
    }

    const float edge_u = edge >= 0 ? capped<kSoftcap>(static_cast<float>(row[edge]), options) : 0.0f;
    // The sampled token, if this thread holds it: in which chunk, which of its vectors there, which of its logits.
    const int target = id >= 0 && id < rows.V ? static_cast<int>(id) : -1;
    int target_first = -1, target_turn = 0, target_place = 0;
    if (target >= slice.head && target < slice.tail) {
      const int vector = (target - slice.head) / kSize - slice.first;
      if (vector >= 0 && vector < slice.vectors && vector % threads == thread) {
        target_first = vector / in_chunk * in_chunk;
        target_turn = vector % in_chunk / threads;
        target_place = (target - slice.head) % kSize;
      }
    }

    // Statistics.
    Statistics part;
    const bool stays = kGradient && slice.stays(layout);
    const Ring begin = ring;
    for (int first = 0; first < slice.vectors; first += in_chunk, ring.next()) {
      barrier_wait(&shared.full[ring.stage], ring.parity);
      uint4 raw[kVectors];
      const bool whole = load_chunk(ring, first, slice.vectors, raw);
      if (!stays) release(ring);
      if (first == target_first) {
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
          if (j == target_turn) part.target = capped<kSoftcap>(take<In>(raw[j], target_place), options);
        }
      }
      part.reach(capped<kSoftcap>(largest<In>(raw), options), inner);
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        float u[kSize];
        if (kRaised<In> && !kSoftcap) raise(raw[j]);
        unpack(raw[j], u, In());
        if (kSoftcap) {  // which makes what fills up a chunk finite
          const bool inside = whole || first + j * threads + thread < slice.vectors;
#pragma unroll
          for (int i = 0; i < kSize; ++i) u[i] = inside ? capped<kSoftcap>(u[i], options) : -INFINITY;
        }
        if (kSoftcap && first == target_first && j == target_turn) {
#pragma unroll
          for (int i = 0; i < kSize; ++i) u[i] = i == target_place ? -INFINITY : u[i];
        }
        part.add<kRaised<In> && !kSoftcap>(u, inner);
      }
    }
    if (edge >= 0) {
      if (edge == target) {
        part.target = edge_u;
      } else {
        const float one[1] = {edge_u};
        part.reach(edge_u, inner);
        part.add<false>(one, inner);
      }
    }
    part.merge_warp(inner);
    if (!kGradient && turn > 0) barrier_wait(shared.ready, (turn - 1) % 2);  // at most two rows of sums at a time
    const int half = turn % 2;
    float4* slot = shared.statistics + half * layout.cluster * layout.consumers + rank * layout.consumers + warp;
    const float4 sums = make_float4(part.base, part.sum, part.weighted, part.target);
    if (layout.cluster == 1) {
      if (lane == 0) *slot = sums;
    } else if (lane < layout.cluster) {
      store_to_rank(slot, sums, &shared.summed[half], lane);
    }
    barrier_arrive(&shared.summed[half]);  // done with the slopes of the row before, too

    // Gradient.
    if (kGradient) {
      barrier_wait(shared.ready, turn % 2);
      const Slopes slopes = *shared.slopes;
      const bool zero = slopes.zero();
      if (stays) ring = begin;
      const auto sweep = [&](auto&& write) {
        for (int first = 0; first < slice.vectors; first += in_chunk, ring.next()) {
          if (!stays) barrier_wait(&shared.full[ring.stage], ring.parity);
          uint4 raw[kVectors];
          const bool whole = load_chunk(ring, first, slice.vectors, raw);
          release(ring);
#pragma unroll
          for (int j = 0; j < kVectors; ++j) {
            const int vector = first + j * threads + thread;
            if (!whole && vector >= slice.vectors) continue;
            float x[kSize];
            unpack(raw[j], x, In());
#pragma unroll
            for (int i = 0; i < kSize; ++i) {
              x[i] = slopes.at<kSoftcap, kTilt>(capped<kSoftcap>(x[i], options), inner, options);
            }
            write(body + int64_t(vector) * kSize, x);
          }
        }
      };
      if (zero) {
        sweep([&](Out* to, const float (&)[kSize]) { write_zeros(to); });
      } else if (lies_together<Out, kSize>(body)) {
        sweep([&](Out* to, const float (&x)[kSize]) { store_together(to, x); });
      } else {
        sweep([&](Out* to, const float (&x)[kSize]) { store_apart(to, x); });
      }
      // The sampled token's own gradient, over what was written there.
      if (target_first >= 0 && !zero) {
        store(out + target, slopes.of_target<kSoftcap>(part.target, options));
      }
      if (edge >= 0) {
        const float g = edge == target ? slopes.of_target<kSoftcap>(part.target, options)
                                       : slopes.at<kSoftcap, kTilt>(edge_u, inner, options);
        store(out + edge, zero ? 0.0f : g);
      }
    }
    ++turn;
  }
}

#endif  // sm_90

template <typename In, typename Out, bool kSoftcap, bool kGradient, bool kTilt, typename Op>
__global__ void __launch_bounds__(kMaxThreads, 1) resident_kernel(const Rows rows, const Op op, const Layout layout) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char memory[];
  const Shared shared(memory, layout);
  const int rank = cluster_rank(), entries = layout.cluster * layout.consumers;
  // Every thread arrives for itself: no slower than one for its warp, and racecheck can follow it.
  const int consumers = 32 * layout.consumers;
  if (threadIdx.x == 0) {
    for (int i = 0; i < layout.stages; ++i) {
      barrier_init(&shared.full[i], 1);
      barrier_init(&shared.empty[i], consumers);
    }
    for (int i = 0; i < 2; ++i) {
      // The cluster's sums are counted in bytes, after an arrival of its own; what a single block stores is not.
      barrier_init(&shared.summed[i], consumers + (layout.cluster > 1));
      if (layout.cluster > 1) barrier_arrive_expect(&shared.summed[i], entries * 16);
    }
    barrier_init(shared.ready, 32);
    barrier_init_fence();
  }
  cluster_sync();
  const int n = blockIdx.x / layout.cluster, step = gridDim.x / layout.cluster;
  const int warp = threadIdx.x / 32;
  if (warp < layout.consumers) {
    consume<In, Out, kSoftcap, kGradient, kTilt>(rows, layout, shared, rank, n, step);
  } else if (warp > layout.consumers) {
    account(rows, op, layout, shared, rank, n, step);
  } else if (threadIdx.x % 32 == 0) {
    load_slices<In, kGradient>(rows, layout, shared, rank, n, step);
  }
#endif
}

// How many clusters of this layout run at a time on the current device.
template <typename Kernel>
cudaError_t clusters_at_once(Kernel* kernel, cudaLaunchConfig_t& config, int* clusters) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(config.dynamicSmemBytes));
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
  return cudaOccupancyMaxActiveClusters(clusters, kernel, &config);
}

template <typename In, typename Out, bool kSoftcap, bool kGradient, bool kTilt, typename Op>
cudaError_t launch_resident(const Rows& rows, const Op& op, const Layout& layout, cudaStream_t stream) {
  const auto kernel = resident_kernel<In, Out, kSoftcap, kGradient, kTilt, Op>;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(layout.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = layout.cluster;
  config.blockDim = 32 * (layout.consumers + 2);
  config.dynamicSmemBytes = bytes_of_block(layout);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  cudaError_t error = clusters_at_once(kernel, config, &clusters);
  if (error != cudaSuccess) return error;
  if (clusters == 0) return cudaErrorLaunchOutOfResources;
  config.gridDim = layout.cluster * (clusters < rows.count ? clusters : rows.count);
  return cudaLaunchKernelEx(&config, kernel, rows, op, layout);
}

}  // namespace grpo_fast
