// The exponentials of a row's logits in 16 bits each: what the gradient needs of them, before the row's sum is known.
//
// exp2(u * inner - base), u the capped logit, as a float without its sign and its last 15 bits: 9 significant bits,
// twice as fine as bfloat16, from 2^-126 to 2^127. The base lies 2^kHeadroom above the sampled token: what is up to
// 2^86 times less likely than that token or 2^127 times as likely as the base keeps its digits, the rest is 0. A row
// in which the likeliest token is 2^kFar above the base has none that are of use; its logits are computed again.

#pragma once

#include "api.h"
#include "row.cuh"

namespace grpo_fast {

constexpr float kHeadroom = 40.0f;
constexpr float kFar = 100.0f;
// The base of a row whose sampled token is excluded, or is none.
constexpr float kLowestBase = -1e30f;

// Where a row's words from this one on lie, as far as they lie together.
__device__ inline uint16_t* place_of(const Exponentials& all, int64_t n, int word) {
  return word < all.split ? all.first.values + n * all.first.stride + word
                          : all.rest.values + n * all.rest.stride + (word - all.split);
}

// Two neighbours, the first in the low half. (A shift to the left instead, one instruction less, is not safe: where x
// is a product, ptxas 13.0 multiplies its factors' bits.)
__device__ inline uint32_t pack_exponentials(float x, float y) {
  return __byte_perm((__float_as_uint(x) + 0x4000u) >> 15, (__float_as_uint(y) + 0x4000u) >> 15, 0x5410);
}

__device__ inline void unpack_exponentials(uint4 raw, float (&e)[8]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    e[2 * i] = __uint_as_float((words[i] & 0xffffu) << 15);
    e[2 * i + 1] = __uint_as_float(words[i] >> 16 << 15);
  }
}

__device__ inline uint32_t pack_bfloat16(float x, float y) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Each of four neighbouring lanes has two words of four groups of eight: afterwards each has all of one group.
__device__ inline uint4 gather_groups(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const auto exchange = [](uint32_t& low, uint32_t& high, int lanes) {
    const bool upper = threadIdx.x & lanes;
    const uint32_t other = __shfl_xor_sync(~0u, upper ? low : high, lanes);
    (upper ? low : high) = other;
  };
  exchange(a, b, 1);
  exchange(c, d, 1);
  exchange(a, c, 2);
  exchange(b, d, 2);
  return make_uint4(a, b, c, d);
}

}  // namespace grpo_fast
