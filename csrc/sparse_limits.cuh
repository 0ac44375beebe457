// Whether most rows of a gradient are too flat to be sparse.

#pragma once

#include "api.h"

namespace grpo_fast {

// Whether there was room for all long rows, after the search. Where there was not, they are dense.
__device__ inline bool had_room(const SparseLimits& limits) {
  return limits.totals == nullptr || limits.totals->in_long <= limits.long_room;
}

// Whether limits are passed if the totals of so many rows are those of all.
__device__ inline bool are_passed(const SparseLimits& limits, const SparseTotals& totals, int rows, int all) {
  const auto of_all = [&](unsigned long long some) { return some * static_cast<unsigned>(all); };
  const auto most = [&](unsigned long long limit) { return limit * static_cast<unsigned>(rows); };
  const bool has_room = of_all(totals.in_long) <= most(limits.long_room);
  const unsigned long long dense = totals.dense + (has_room ? 0ull : totals.longs);
  return of_all(totals.in_short) > most(limits.short_room) || of_all(dense) > most(limits.most_dense);
}

// Whether they are by now. Totals only grow: once limits are passed, they remain so.
__device__ inline bool are_passed(const SparseLimits& limits) {
  if (limits.totals == nullptr) return false;
  const volatile SparseTotals* now = limits.totals;
  return are_passed(limits, {now->in_short, now->in_long, now->longs, now->dense}, 1, 1);
}

}  // namespace grpo_fast
