// Which small elements of a row stand for all of them: each is drawn with a probability of its size by a threshold.
//
// The elements of eight neighbouring words lie one after the other on a line, each as long as it is large, from an
// origin that is random; drawn are those with a multiple of the threshold in them. Thresholds are powers of two, so
// what is drawn by one is drawn by all smaller ones, and an element's level says by which: those below 2^-level. What
// is as long as the threshold is always drawn, and what is shorter than half a unit never. Everything follows from the
// row and its numbers: the same every time.

#pragma once

#include <cstdint>

#include "api.h"

namespace grpo_fast {

constexpr int kLevels = kSparsePowers;
constexpr float kUnit = 4294967296.0f;  // of lengths, in 1
constexpr float kLeast = 1.0f / (1 << kLevels);

// Bits that look random, by an invertible function (multiplications and shifts).
__device__ inline uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

__device__ inline uint32_t origin_of(uint32_t seed, int vector) {
  return mix(seed + static_cast<uint32_t>(vector) * 0x9e3779b9u);
}

// An element's length in units; what is longer than half is as good as half.
__device__ inline uint32_t length_of(float relative) { return __float2uint_rn(fminf(fabsf(relative), 0.5f) * kUnit); }

// Of what lies between these: kLevels or more if no threshold draws it.
__device__ inline int level_of(uint32_t begin, uint32_t end) { return __clz(static_cast<int>(begin ^ end)); }

// Whether elements that add up to this may have one that is drawn; it may say so of a few too many.
__device__ inline bool may_be_drawn(uint32_t origin, float sum) {
  constexpr uint32_t kStep = 1u << (32 - kLevels);
  return sum * kUnit + 8.0f >= static_cast<float>(kStep - origin % kStep);
}

}  // namespace grpo_fast
