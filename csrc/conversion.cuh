// From a row's exponentials to the gradient of its logits, in their place: by a kernel of its own (linear_rows.cu), or
// by warps of the product with other rows (linear_statistics.cu).

#pragma once

#include "exponential.cuh"
#include "head.cuh"
#include "scalars.cuh"

namespace grpo_fast {

constexpr int kSliceVectors = 512;  // of 16 bytes, of what is converted at a time
constexpr int kLoads = 4;           // of 16 bytes, in flight per thread

// Vectors of a row that lie together.
struct SliceOfRow {
  int first, end;
};

class Slices {
 public:
  __host__ __device__ Slices(const Head& head, const Exponentials& all)
      : early_(((head.V < all.split ? head.V : all.split) + 7) / 8),
        late_(head.V < all.split ? 0 : (head.V - all.split + 7) / 8) {}

  // Of a row.
  __host__ __device__ int count() const { return in_slices(early_) + in_slices(late_); }

  __device__ SliceOfRow operator[](int i) const {
    const bool is_late = i >= in_slices(early_);
    const int first = is_late ? early_ + (i - in_slices(early_)) * kSliceVectors : i * kSliceVectors;
    return {first, min(first + kSliceVectors, is_late ? early_ + late_ : early_)};
  }

 private:
  __host__ __device__ static int in_slices(int vectors) { return (vectors + kSliceVectors - 1) / kSliceVectors; }

  int early_, late_;  // vectors in the first place, and in the other
};

class RowConversion {
 public:
  __device__ RowConversion(const Conversion& conversion, int n)
      : conversion_(conversion), n_(n), slopes_(reinterpret_cast<const Slopes*>(conversion.slopes)[n]) {
    const int64_t id = integer(conversion.head.ids, n);
    target_ = id >= 0 && id < conversion.head.V ? static_cast<int>(id) : -8;  // in no vector
    zero_ = slopes_.zero();
    up_ = conversion.exponentials.bases[n] - slopes_.shift;
    factor_ = zero_ ? 0.0f : exp2f(up_);
  }

  // Convert a slice, by so many threads, in whole warps, of which this is one.
  template <int kThreads>
  __device__ void convert(const SliceOfRow& slice, int thread) const {
    uint4* const values = reinterpret_cast<uint4*>(place_of(conversion_.exponentials, n_, slice.first * 8));
    if (!zero_ && -up_ > kFar) {
      project<kThreads / 32>(slice, thread / 32, values);
      return;
    }
    const int count = slice.end - slice.first;
    for (int first = thread; first < count; first += kThreads * kLoads) {
      uint4 raw[kLoads] = {};
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        if (!zero_ && first + j * kThreads < count) raw[j] = __ldcs(&values[first + j * kThreads]);
      }
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int i = first + j * kThreads;
        if (i >= count) break;
        float x[8];
        unpack_exponentials(raw[j], x);
        // With a tilt, as it is 0 where there is none: what it costs is beside the memory's time.
#pragma unroll
        for (int k = 0; k < 8; ++k) x[k] = slopes_.of_exponential<true>(x[k], factor_, up_);
        store(&values[i], slice.first + i, x);
      }
    }
  }

 private:
  // The same from the logits, of a row whose exponentials are of no use.
  template <int kWarps>
  __device__ void project(const SliceOfRow& slice, int warp, uint4* values) const {
    const Head& head = conversion_.head;
    const int lane = threadIdx.x % 32;
    for (int vector = slice.first + warp; vector < slice.end; vector += kWarps) {
      const int words = min(head.V - vector * 8, 8);
      float mine = 0.0f;  // in the first lanes, a word each
#pragma unroll 1
      for (int k = 0; k < words; ++k) {
        float u = logit<__nv_bfloat16>(head, n_, vector * 8 + k, lane, 32);
        for (int across = 16; across > 0; across /= 2) u += __shfl_xor_sync(~0u, u, across);
        if (lane == k) mine = slopes_.at<false, true>(u, head.options.slope * kLog2e, head.options);
      }
      float x[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) x[k] = __shfl_sync(~0u, mine, k);
      if (lane == 0) store(&values[vector - slice.first], vector, x);
    }
  }

  __device__ void store(uint4* to, int vector, float (&x)[8]) const {
    if (target_ >> 3 == vector) {
#pragma unroll
      for (int k = 0; k < 8; ++k) x[k] = k == (target_ & 7) ? slopes_.at_target : x[k];
    }
    store_together(reinterpret_cast<__nv_bfloat16*>(to), x);
  }

  const Conversion& conversion_;
  int n_, target_;
  Slopes slopes_;
  float up_, factor_;
  bool zero_;
};

}  // namespace grpo_fast
