// From a row's exponentials to the gradient of its logits, in their place: by a kernel of its own (linear_rows.cu), or
// by warps of the product with the next rows (linear_statistics.cu).

#pragma once

#include "exponential.cuh"
#include "head.cuh"
#include "scalars.cuh"

namespace grpo_fast {

constexpr int kVectorsAThread = 4;  // of 16 bytes, in flight per thread

// Vectors of a row, from `first` to `end` of those that lie together; the row's words begin `before` vectors earlier.
struct SliceOfRow {
  int before, first, end;
};

// A row in slices of so many vectors.
template <int kVectors>
class Slices {
 public:
  __host__ __device__ Slices(const Head& head, const Exponentials& all)
      : early_(((head.V < all.split ? head.V : all.split) + 7) / 8),
        late_(head.V < all.split ? 0 : (head.V - all.split + 7) / 8) {}

  __host__ __device__ int count() const { return early() + (late_ + kVectors - 1) / kVectors; }

  __device__ SliceOfRow operator[](int i) const {
    const bool is_late = i >= early();
    const int first = (is_late ? i - early() : i) * kVectors, vectors = is_late ? late_ : early_;
    return {is_late ? early_ : 0, first, min(first + kVectors, vectors)};
  }

 private:
  __host__ __device__ int early() const { return (early_ + kVectors - 1) / kVectors; }

  int early_, late_;
};

class RowConversion {
 public:
  __device__ RowConversion(const Conversion& all, int n)
      : all_(all), n_(n), slopes_(reinterpret_cast<const Slopes*>(all.slopes)[n]) {
    const int64_t id = integer(all.head.ids, n);
    target_ = id >= 0 && id < all.head.V ? static_cast<int>(id) : -8;  // in no vector
    zero_ = slopes_.zero();
    up_ = all.exponentials.bases[n] - slopes_.shift;
    factor_ = zero_ ? 0.0f : exp2f(up_);
  }

  // Of a slice the vectors from this one on, `kStride` apart, as many as a thread takes.
  template <bool kTilt, int kStride>
  __device__ void convert(const SliceOfRow& slice, int first) const {
    uint4* const row = reinterpret_cast<uint4*>(place_of(all_.exponentials, n_, slice.before * 8));
    uint4 raw[kVectorsAThread] = {};
#pragma unroll
    for (int j = 0; j < kVectorsAThread; ++j) {
      if (!zero_ && first + j * kStride < slice.end) raw[j] = __ldcs(&row[first + j * kStride]);
    }
#pragma unroll
    for (int j = 0; j < kVectorsAThread; ++j) {
      const int vector = first + j * kStride;
      if (vector >= slice.end) break;
      float x[8];
      unpack_exponentials(raw[j], x);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = slopes_.of_exponential<kTilt>(x[i], factor_, up_);
      store(row, slice, vector, x);
    }
  }

  // Whether the exponentials are of no use.
  __device__ bool far() const { return !zero_ && -up_ > kFar; }

  // All of a slice of a row that is far, from its logits, by so many warps.
  __device__ void project(const SliceOfRow& slice, int warp, int warps) const {
    const int lane = threadIdx.x % 32;
    uint4* const row = reinterpret_cast<uint4*>(place_of(all_.exponentials, n_, slice.before * 8));
    for (int vector = slice.first + warp; vector < slice.end; vector += warps) {
      const int first = (slice.before + vector) * 8, words = min(all_.head.V - first, 8);
      float mine = 0.0f;  // in the first lanes, a word each
#pragma unroll 1
      for (int i = 0; i < words; ++i) {
        float u = logit<__nv_bfloat16>(all_.head, n_, first + i, lane, 32);
        for (int across = 16; across > 0; across /= 2) u += __shfl_xor_sync(~0u, u, across);
        // With a tilt, as it is 0 where there is none.
        if (lane == i) mine = slopes_.at<false, true>(u, all_.head.options.slope * kLog2e, all_.head.options);
      }
      float x[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = __shfl_sync(~0u, mine, i);
      if (lane == 0) store(row, slice, vector, x);
    }
  }

 private:
  __device__ void store(uint4* row, const SliceOfRow& slice, int vector, float (&x)[8]) const {
    if (target_ >> 3 == slice.before + vector) {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = i == (target_ & 7) ? slopes_.at_target : x[i];
    }
    store_together(reinterpret_cast<__nv_bfloat16*>(&row[vector]), x);
  }

  const Conversion& all_;
  int n_, target_;
  Slopes slopes_;
  float up_, factor_;
  bool zero_;
};

}  // namespace grpo_fast
