// The arithmetic of a row of logits: statistics online, log-prob and entropy from them, the gradient of the logits.
//
// Logits x become capped logits u (u = x without a softcap); p_j = exp2(u_j * inner - shift) / total, with
// inner = slope * log2(e) and shift = base * inner rounded once, so that its rounding is the same in all of a row's
// exponents. The sampled token is left out of the sums and added at the end: a row that is nearly sure of it keeps
// 1 - p to full precision, where 1 - exp(logp) would be 0.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "api.h"

namespace grpo_fast {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
// exp2 of anything below is 0 in float32; stands in for -inf where 0 * -inf must be 0.
constexpr float kLowest = -150.0f;
// A base for rows of -inf only: finite, so that exponents relative to it are -inf and not NaN.
constexpr float kFloor = -1e30f;
// A base moves up when a logit is this many powers of two above it: seldom, and no exponent is ever large.
constexpr float kSlack = 8.0f;

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <bool kSoftcap>
__device__ inline float capped(float x, const LogitOptions& options) {
  if (!kSoftcap) return x;
  const float y = x * options.cap_in;
  const float e = exp2_fast(-2.0f * kLog2e * fabsf(y));
  return copysignf(options.cap * __fdividef(1.0f - e, 1.0f + e), y);  // absolute error about 1e-7 of cap
}

// 16 bytes of logits.
template <typename T>
struct Vector {
  static constexpr int kSize = 16 / sizeof(T);
};

__device__ inline void unpack(uint4 raw, float (&x)[8], __nv_bfloat16) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

__device__ inline void unpack(uint4 raw, float (&x)[8], __half) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

__device__ inline void unpack(uint4 raw, float (&x)[4], float) {
  x[0] = __uint_as_float(raw.x), x[1] = __uint_as_float(raw.y);
  x[2] = __uint_as_float(raw.z), x[3] = __uint_as_float(raw.w);
}

// -inf's bits.
__device__ inline uint32_t minus_infinity(__nv_bfloat16) { return 0xff80u; }
__device__ inline uint32_t minus_infinity(__half) { return 0xfc00u; }
__device__ inline uint32_t minus_infinity(float) { return 0xff800000u; }

// The larger of each pair; a NaN loses.
__device__ inline uint32_t larger(uint32_t a, uint32_t b, __nv_bfloat16) {
  const auto c = __hmax2(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&c);
}

__device__ inline uint32_t larger(uint32_t a, uint32_t b, __half) {
  const auto c = __hmax2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&c);
}

__device__ inline uint32_t larger(uint32_t a, uint32_t b, float) {
  return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
}

// The largest of 16 bytes of logits each, NaN aside: halves are compared two at a time, before they are converted.
template <typename T, int kVectors>
__device__ inline float largest(const uint4 (&raw)[kVectors]) {
  uint32_t top = raw[0].x;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    top = larger(larger(larger(larger(top, raw[i].x, T()), raw[i].y, T()), raw[i].z, T()), raw[i].w, T());
  }
  float x[Vector<T>::kSize];
  unpack(make_uint4(top, top, top, top), x, T());
  return fmaxf(x[0], x[1]);
}

// Whether d * exp2(d) is finite as it is after `raise`.
template <typename T>
constexpr bool kRaised = std::is_same_v<T, __nv_bfloat16>;

// Replace -inf, two at a time, by what has probability 0 all the same and makes no 0 * inf. Only bfloat16 holds such a
// number; for the others `Statistics::add` sees to it, one at a time.
__device__ inline void raise(uint4& raw) {
  const auto raised = [](uint32_t pair) {
    uint32_t lowest = 0xf49cf49cu;  // about -1e32
    const auto x = *reinterpret_cast<__nv_bfloat162*>(&pair), y = *reinterpret_cast<__nv_bfloat162*>(&lowest);
    const auto z = __hmax2_nan(x, y);
    return *reinterpret_cast<const uint32_t*>(&z);
  };
  raw = make_uint4(raised(raw.x), raised(raw.y), raised(raw.z), raised(raw.w));
}

// Take the logit at `place` of a vector, and leave -inf there.
template <typename T>
__device__ inline float take(uint4& raw, int place) {
  uint32_t* words[4] = {&raw.x, &raw.y, &raw.z, &raw.w};
  float taken = 0.0f;
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) {
    if (i != place) continue;
    uint32_t& word = *words[i * sizeof(T) / 4];
    float x[Vector<T>::kSize];
    unpack(raw, x, T());
    taken = x[i];
    const uint32_t infinity = minus_infinity(T());
    if (sizeof(T) == 4) {
      word = infinity;
    } else {
      word = i % 2 == 0 ? (word & 0xffff0000u) | infinity : (word & 0xffffu) | infinity << 16;
    }
  }
  return taken;
}

__device__ inline void store(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }
__device__ inline void store(__half* to, float x) { *to = __float2half_rn(x); }
__device__ inline void store(float* to, float x) { *to = x; }

__device__ inline uint32_t pack(float x, float y, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ inline uint32_t pack(float x, float y, __half) {
  const __half2 pair = __floats2half2_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Writes kSize neighbours of a row at once, past the caches, since nothing reads them soon.
template <typename Out, int kSize>
__device__ inline void store_together(Out* to, const float (&x)[kSize]) {
  if constexpr (sizeof(Out) == 4) {
    static_assert(kSize == 4);
    __stcs(reinterpret_cast<float4*>(to), make_float4(x[0], x[1], x[2], x[3]));
  } else if constexpr (kSize == 4) {
    __stcs(reinterpret_cast<uint2*>(to), make_uint2(pack(x[0], x[1], Out()), pack(x[2], x[3], Out())));
  } else {
    __stcs(reinterpret_cast<uint4*>(to), make_uint4(pack(x[0], x[1], Out()), pack(x[2], x[3], Out()),
                                                    pack(x[4], x[5], Out()), pack(x[6], x[7], Out())));
  }
}

// Whether that can be done; elsewhere they are written one by one.
template <typename Out, int kSize>
__device__ inline bool lies_together(const Out* to) {
  return reinterpret_cast<uintptr_t>(to) % (kSize * sizeof(Out)) == 0;
}

template <typename Out, int kSize>
__device__ inline void store_apart(Out* to, const float (&x)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) store(to + i, x[i]);
}

// What a part of a row adds to it: sums of exp2(d) and of d * exp2(d), d = u * inner - shift(base), over all but the
// sampled token, and the sampled token's u from whoever holds it.
struct Statistics {
  float base = kFloor;
  float sum = 0.0f;
  float weighted = 0.0f;
  float target = 0.0f;

  __device__ static float shift(float base, float inner) { return __fmul_rn(base, inner); }

  __device__ void rebase(float to, float inner) {
    const float down = shift(base, inner) - shift(to, inner);
    const float factor = exp2_fast(down);
    weighted = (weighted + sum * down) * factor;
    sum *= factor;
    base = to;
  }

  // Raise the base if u is far above it.
  __device__ void reach(float u, float inner) {
    if (__fmaf_rn(u, inner, -shift(base, inner)) > kSlack) rebase(u, inner);
  }

  // Take in logits that are not far above the base, and leave exp2(d) in their place; -inf adds nothing.
  template <bool kFinite, int kSize>
  __device__ void exponentiate(float (&u)[kSize], float inner) {
    const float minus = -shift(base, inner);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float d = __fmaf_rn(u[i], inner, minus);
      u[i] = exp2_fast(d);
      sum += u[i];
      weighted = __fmaf_rn(u[i], kFinite ? d : fmaxf(d, kLowest), weighted);
    }
  }

  template <bool kFinite, int kSize>
  __device__ void add(const float (&u)[kSize], float inner) {
    float copy[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) copy[i] = u[i];
    exponentiate<kFinite>(copy, inner);
  }

  // The same for the sum of both, in this order.
  __device__ void merge(Statistics other, float inner) {
    if (other.base > base) {
      rebase(other.base, inner);
    } else {
      other.rebase(base, inner);
    }
    sum += other.sum;
    weighted += other.weighted;
    target += other.target;
  }

  // The sums of a whole warp, in every lane.
  __device__ void merge_warp(float inner) {
    float top = base;
    for (int lane = 16; lane > 0; lane /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, lane));
    rebase(top, inner);
    for (int lane = 16; lane > 0; lane /= 2) {
      sum += __shfl_xor_sync(~0u, sum, lane);
      weighted += __shfl_xor_sync(~0u, weighted, lane);
      target += __shfl_xor_sync(~0u, target, lane);
    }
  }
};

// A row's softmax as far as its gradient needs it.
struct Softmax {
  float logp;     // of the sampled token
  float entropy;  // nats
  float shift;
  float total;
  bool sampled;  // whether the target lies in the row; otherwise logp is NaN, and nothing follows from it

  // `rest`: the whole row's statistics.
  __device__ static Softmax from(Statistics rest, bool sampled, const LogitOptions& options) {
    const float inner = options.slope * kLog2e;
    const float u_t = rest.target;
    float e_t = 0.0f, d_t = kLowest;
    if (sampled) {
      if (u_t > rest.base) rest.rebase(u_t, inner);
      d_t = __fmaf_rn(u_t, inner, -Statistics::shift(rest.base, inner));
      e_t = exp2f(d_t);
    }
    Softmax row;
    row.sampled = sampled;
    row.shift = Statistics::shift(rest.base, inner);
    row.total = rest.sum + e_t;
    // shift is a rounded base * inner; what it is off by is taken back here, where it does not cancel.
    const float log_total = logf(row.total) - kLn2 * __fmaf_rn(rest.base, inner, -row.shift);
    row.logp = u_t >= rest.base ? -log1pf(rest.sum / e_t) : (u_t - rest.base) * options.slope - log_total;
    // A row of nothing but -inf, or of what is as good as that, has no softmax.
    if (!sampled || row.total == 0.0f) row.logp = NAN;
    const float mean_d = (rest.weighted + e_t * fmaxf(d_t, kLowest)) / row.total;
    row.entropy = kLn2 * (log2f(row.total) - mean_d);
    return row;
  }
};

// The gradient of a row: exp2(d) * (flat + tilt * d), and at_target at the sampled token.
struct Slopes {
  float shift;
  float flat;
  float tilt;
  float at_target;

  // From upstream gradients of log-prob and entropy: d_logp (onehot - p) - d_entropy p (log p + entropy). At the
  // target 1 - p comes from expm1, not from a subtraction.
  __device__ static Slopes from(const Softmax& row, float d_logp, float d_entropy, const LogitOptions& options) {
    if (d_logp == 0.0f && d_entropy == 0.0f) return {0.0f, 0.0f, 0.0f, 0.0f};
    Slopes slopes = {row.shift, -d_logp, 0.0f, -d_logp * expm1f(row.logp)};
    if (d_entropy != 0.0f) {
      slopes.at_target -= d_entropy * expf(row.logp) * (fmaxf(row.logp, kLowest) + row.entropy);
      slopes.flat -= d_entropy * (row.entropy - logf(row.total));
      slopes.tilt = -d_entropy * kLn2;
    }
    slopes.flat *= options.slope / row.total;
    slopes.tilt *= options.slope / row.total;
    slopes.at_target *= options.slope;
    return slopes;
  }

  __device__ bool zero() const { return flat == 0.0f && tilt == 0.0f && at_target == 0.0f; }

  // By a logit, from its u.
  template <bool kSoftcap, bool kTilt>
  __device__ float at(float u, float inner, const LogitOptions& options) const {
    const float d = __fmaf_rn(u, inner, -shift);
    const float e = exp2_fast(d);
    const float gradient = kTilt ? e * __fmaf_rn(tilt, fmaxf(d, kLowest), flat) : e * flat;
    return gradient * uncapped<kSoftcap>(u, options);
  }

  // By a logit, from e, its exponential relative to a base 2^up above the shift; factor = exp2(up).
  template <bool kTilt>
  __device__ float of_exponential(float e, float factor, float up) const {
    return e * factor * (kTilt ? __fmaf_rn(tilt, fmaxf(__log2f(e) + up, kLowest), flat) : flat);
  }

  template <bool kSoftcap>
  __device__ float of_target(float u, const LogitOptions& options) const {
    return at_target * uncapped<kSoftcap>(u, options);
  }

 private:
  // d u / d x
  template <bool kSoftcap>
  __device__ static float uncapped(float u, const LogitOptions& options) {
    if (!kSoftcap) return 1.0f;
    const float t = u / options.cap;
    return options.cap * options.cap_in * (1.0f - t * t);
  }
};

}  // namespace grpo_fast
