// Whether most rows of a gradient are too flat to be sparse.

#pragma once

#include "api.h"

namespace grpo_fast {

// Totals only grow: once limits are passed, they remain so.
__device__ inline bool are_passed(const SparseLimits& limits) {
  if (limits.totals == nullptr) return false;
  const volatile SparseTotals* now = limits.totals;
  const unsigned long long dense = now->dense + (now->in_long > limits.long_room ? now->longs : 0ull);
  return now->in_short > limits.short_room || dense > limits.most_dense;
}

}  // namespace grpo_fast
