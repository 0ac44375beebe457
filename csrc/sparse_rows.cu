// The gradient of the logits as sparse rows, from their exponentials.
//
// Kept are elements that are as large as a threshold; smaller ones are raised to it with a probability of their size by
// it, or dropped (draw.cuh), so that on average nothing is lost. Sizes are by `usual`, that of the sampled tokens'
// elements in the root mean square, and the threshold, the same for all rows, is the largest 2^-k with which the
// expected square of the error, estimated from some of the rows, is at most that of `tolerance`, and no element's error
// is more than `tolerance`. A row whose own would be far more than its share has a smaller one. Sums are of integers,
// or made by threads in a fixed order, so the choice is the same every time.

#include "draw.cuh"
#include "exponential.cuh"
#include "scalars.cuh"
#include "sparse_limits.cuh"

namespace grpo_fast {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kTurns = kSparseWords / (8 * kThreads);  // vectors of a thread, at most
constexpr int kAtOnce = 4;
constexpr float kMostError = 4.0f;  // SPARSE_MOST_ERROR in reference.py
constexpr int kRestBits = 40;       // of sums of what is below all thresholds, as integers
static_assert(kTurns <= 64, "a thread's vectors are a bit each, of 64");

// The power of two that what is so many times as large as usual falls short of that by, rounded down.
__device__ inline int power_of(float relative) {
  return max(126 - static_cast<int>(__float_as_uint(relative) >> 23), 0);
}

__device__ inline void put_row(const SparseRows& out, int n, int64_t start, int64_t end) {
  out.starts[n] = start;
  out.ends[n] = end;
}

// Where draws begin: other numbers or another row, other draws.
__device__ inline uint32_t seed_of(int number, float x, float y) {
  return mix(mix(mix(number) + __float_as_uint(x)) + __float_as_uint(y));
}

// A row's elements, by what is usual.
template <bool kTilt>
struct Row {
  Slopes slopes;
  float up, factor, scale;
  float by;  // what exponentials are multiplied by where entropies have no gradient
  int64_t id;
  const uint4* exponentials;
  uint32_t seed;
  int vectors;

  __device__ Row(const Head& head, const Exponentials& all, const Slopes& slopes, float usual, int n, int number)
      : slopes(slopes),
        up(all.bases[n] - slopes.shift),
        factor(exp2f(up)),
        scale(1.0f / usual),
        by(factor * (slopes.flat * scale)),  // factor and slope alone can leave float32's range
        id(integer(head.ids, n)),
        exponentials(reinterpret_cast<const uint4*>(all.first.values + n * all.first.stride)),
        seed(seed_of(number, slopes.at_target, up)),
        vectors((head.V + 7) / 8) {}

  // Whether the exponentials have digits, and sizes are numbers.
  __device__ bool is_readable() const {
    return -up <= kFar && fabsf(slopes.at_target) < 1e30f && scale > 1e-30f && scale < 1e30f;
  }

  __device__ void elements(int vector, uint4 raw, float (&x)[8]) const {
    unpack_exponentials(raw, x);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = slopes.template of_exponential<kTilt>(x[i], factor, up) * scale;
    if (id / 8 == vector) {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = i == id % 8 ? slopes.at_target * scale : x[i];
    }
  }

  // What a vector's elements add up to in size, whatever that of the sampled token is.
  __device__ float sum_of(uint4 raw) const {
    float x[8], sum = 0.0f;
    unpack_exponentials(raw, x);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += kTilt ? fabsf(slopes.template of_exponential<kTilt>(x[i], factor, up)) : x[i];
    return kTilt ? sum * scale : fabsf(sum * by);
  }

  // Gives `use` each element's place, length and level.
  template <typename Use>
  __device__ void draw(int vector, const float (&x)[8], Use use) const {
    uint32_t at = origin_of(seed, vector);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t length = length_of(x[i]);
      use(i, length, level_of(at, at + length));
      at += length;
    }
  }
};

// Of a row, by all threads of its block. What several add to is a number a lane: a bank each.
struct Counts {
  int drawn[kLevels][32];             // elements, by the level at which they are
  uint32_t lengths[kLevels][32];      // of elements, by the power of two that they fall short by
  float rest[kWarps];                 // what is below all thresholds
  uint8_t levels[kTurns * kThreads];  // of a vector's elements the least
  uint32_t queue[kWarps][2 * 32];     // vectors to look at
};

// Units of such lengths, in what the power of two is: as many digits as there are bits for if all words are that long.
constexpr int kLengthBits = 13;
static_assert(uint64_t(kSparseWords) << kLengthBits < uint64_t(1) << 32, "lengths of a row add up to 32 bits");

__device__ inline void clear(Counts& counts, int vectors) {
  const int thread = threadIdx.x;
  static_assert(kThreads == kLevels * 32, "a thread a number");
  counts.drawn[thread / 32][thread % 32] = 0;
  counts.lengths[thread / 32][thread % 32] = 0;
  auto* levels = reinterpret_cast<uint32_t*>(counts.levels);
  for (int i = thread; i < (vectors + 3) / 4; i += kThreads) levels[i] = kLevels * 0x01010101u;
}

// Counts a vector's elements; returns those below all thresholds, unless all are and have been added up.
template <bool kTilt>
__device__ float look_at(const Row<kTilt>& row, int vector, bool all_small, Counts& counts) {
  float x[8], rest = 0.0f;
  row.elements(vector, __ldg(&row.exponentials[vector]), x);
  int least = kLevels;
  row.draw(vector, x, [&](int i, uint32_t length, int level) {
    const int lane = threadIdx.x % 32;
    least = min(least, level);
    if (level < kLevels) atomicAdd(&counts.drawn[level][lane], 1);
    if (all_small) return;
    const int power = power_of(fabsf(x[i]));
    if (power < kLevels) {
      // In 32 bits: what has 64 is added up by trying until nobody else was first.
      atomicAdd(&counts.lengths[power][lane], ((length >> (31 - kLengthBits - power)) + 1) / 2);
    } else {
      rest += fabsf(x[i]);
    }
  });
  counts.levels[vector] = static_cast<uint8_t>(least);
  return rest;
}

// Few vectors have elements that some threshold draws, or that are large: a warp puts off those that may, until it has
// one for each of its threads.
template <bool kTilt>
__device__ void count(const Row<kTilt>& row, Counts& counts) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, sampled = static_cast<int>(row.id / 8);
  uint32_t* queue = counts.queue[warp];
  int queued = 0;
  float rest = 0.0f;
  const auto look = [&](bool has_one) {
    __syncwarp();
    if (has_one) rest += look_at(row, static_cast<int>(queue[queued + lane] >> 1), queue[queued + lane] & 1, counts);
    __syncwarp();
  };
  for (int first = 0; first * kThreads < row.vectors; first += kAtOnce) {
    uint4 raw[kAtOnce] = {};
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int vector = (first + j) * kThreads + threadIdx.x;
      if (vector < row.vectors) raw[j] = __ldg(&row.exponentials[vector]);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int vector = (first + j) * kThreads + threadIdx.x;
      const float sum = row.sum_of(raw[j]);
      const bool all_small = sum < kLeast && vector != sampled;
      if (all_small) rest += sum;  // 0 behind the last vector
      const bool is_put_off = vector < row.vectors && (!all_small || may_be_drawn(origin_of(row.seed, vector), sum));
      const unsigned those = __ballot_sync(~0u, is_put_off);
      if (is_put_off) queue[queued + __popc(those & ((1u << lane) - 1))] = vector << 1 | all_small;
      queued += __popc(those);
      if (queued >= 32) {
        queued -= 32;
        look(true);
      }
    }
  }
  const bool has_one = lane < queued;
  queued = 0;
  look(has_one);
  for (int across = 16; across > 0; across /= 2) rest += __shfl_xor_sync(~0u, rest, across);
  if (lane == 0) counts.rest[warp] = rest;
}

// The largest threshold 2^-k, k not below `first`, that times the sum of what is smaller is no more than `most`;
// kLevels + 1 if none is. `length_of_power` are the lengths' sums.
template <typename Sum>
__device__ int find_power(float below, Sum length_of_power, int first, float most) {
  if (ldexpf(below, -kLevels) > most) return kLevels + 1;
  int power = kLevels;
  for (; power > first; --power) {
    below += ldexpf(length_of_power(power - 1), -(power - 1) - kLengthBits);
    if (ldexpf(below, 1 - power) > most) break;
  }
  return power;
}

// An element x below the threshold t has the variance x (t - x): together no more than t times their sum. By a warp.
__device__ int power_of_all(const SparseRows& out, float tolerance) {
  const int lane = threadIdx.x % 32;
  const float mine = lane < kLevels ? static_cast<float>(out.sample->lengths[lane]) : 0.0f;
  int first = 1;
  while (ldexpf(1.0f, -first) > tolerance) ++first;
  return find_power(
      ldexpf(static_cast<float>(out.sample->rest), -kRestBits),
      [&](int power) { return __shfl_sync(~0u, mine, power); }, first, tolerance * tolerance * out.sampled);
}

__device__ inline float rest_of(const Counts& counts) {
  float rest = 0.0f;
  for (int warp = 0; warp < kWarps; ++warp) rest += counts.rest[warp];
  return rest;
}

__device__ inline uint32_t lengths_of(const Counts& counts, int power) {
  return __reduce_add_sync(~0u, counts.lengths[power][threadIdx.x % 32]);
}

// The same of a row alone, for an error of kMostError tolerances; more if it is larger than usual, but less than so
// many times as much. By a warp.
template <bool kTilt>
__device__ int power_of_row(const Row<kTilt>& row, const Counts& counts, int first, float tolerance) {
  const float most = kMostError * kMostError * tolerance * tolerance;
  return find_power(
      rest_of(counts), [&](int power) { return static_cast<float>(lengths_of(counts, power)); }, first,
      most * fmaxf(1.0f, fabsf(row.slopes.at_target * row.scale)));
}

__device__ inline int drawn_by(const Counts& counts, int power) {
  int drawn = 0;
  for (int level = 0; level < power; ++level) {
    drawn += __reduce_add_sync(~0u, counts.drawn[level][threadIdx.x % 32]);
  }
  return drawn;
}

// Adds a row with such a threshold and so many elements to totals: returns how many there were before, of short rows or
// of long ones as it is; -1 if it is dense.
__device__ int64_t add_row(const SparseRows& out, int power, int kept, SparseTotals& totals) {
  if (power > kLevels || kept > out.long_most) {
    atomicAdd(&totals.dense, 1ull);
    return -1;
  }
  const bool is_long = kept > out.short_most;
  if (is_long) atomicAdd(&totals.longs, 1ull);
  return static_cast<int64_t>(
      atomicAdd(is_long ? &totals.in_long : &totals.in_short, static_cast<unsigned long long>(kept)));
}

// A place in the pool for row n; -1 if there is none, or it is dense, or has no elements.
__device__ int64_t take_room(const SparseRows& out, int n, int power, int kept) {
  const int64_t before = add_row(out, power, kept, *out.limits.totals);
  const bool is_long = kept > out.short_most;
  const int64_t border = out.limits.short_room, room = is_long ? out.limits.long_room : border;
  const int64_t place = is_long ? border + before : border - before - kept;
  const bool fits = before >= 0 && before + kept <= room;
  fits ? put_row(out, n, place, place + kept) : put_row(out, n, 0, -1);
  return kept == 0 || !fits ? -1 : place;
}

__device__ inline int sum_to_here(int mine) {
  const int lane = threadIdx.x % 32;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, mine, step);
    mine += lane >= step ? other : 0;
  }
  return mine;
}

// What is drawn by 2^-power, to its place, in the order of the words: of (turn, warp), then within a warp. Most warps
// have nothing in most turns. `starts` is memory for a number a turn and warp.
template <bool kTilt>
__device__ void write(const Row<kTilt>& row, const Counts& counts, int power, int64_t place, int number, float usual,
                      int* starts, const SparseRows& out) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int turns = (row.vectors + kThreads - 1) / kThreads;
  uint64_t seen = 0;  // the thread's vectors of which something is drawn, by turn
  for (int turn = 0; turn < turns; ++turn) {
    const int vector = turn * kThreads + thread;
    if (vector < row.vectors && counts.levels[vector] < power) seen |= uint64_t(1) << turn;
  }
  const uint64_t warps_turns = __reduce_or_sync(~0u, static_cast<unsigned>(seen)) |
                               uint64_t(__reduce_or_sync(~0u, static_cast<unsigned>(seen >> 32))) << 32;
  const auto kept_of = [&](int turn, float (&x)[8]) {
    unsigned kept = 0;
    if (seen >> turn & 1) {
      const int vector = turn * kThreads + thread;
      row.elements(vector, __ldg(&row.exponentials[vector]), x);
      row.draw(vector, x, [&](int i, uint32_t, int level) { kept |= unsigned(level < power) << i; });
    }
    return kept;
  };
  for (int turn = 0; turn < turns; ++turn) {
    int count = 0;
    if (warps_turns >> turn & 1) {
      float x[8];
      count = __reduce_add_sync(~0u, __popc(kept_of(turn, x)));
    }
    if (lane == 0) starts[turn * kWarps + warp] = count;
  }
  __syncthreads();
  if (warp == 0) {
    int before = 0;
    for (int first = 0; first < turns * kWarps; first += 32) {
      const int mine = first + lane < turns * kWarps ? starts[first + lane] : 0, sum = sum_to_here(mine);
      if (first + lane < turns * kWarps) starts[first + lane] = before + sum - mine;
      before += __shfl_sync(~0u, sum, 31);
    }
  }
  __syncthreads();
  const float threshold = ldexpf(1.0f, -power);
  for (uint64_t left = warps_turns; left != 0; left &= left - 1) {
    const int turn = __ffsll(static_cast<long long>(left)) - 1;
    float x[8];
    const unsigned kept = kept_of(turn, x);
    const int mine = __popc(kept);
    int64_t at = place + starts[turn * kWarps + warp] + sum_to_here(mine) - mine;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (kept >> i & 1) {
        const int64_t word = (turn * kThreads + thread) * 8 + i;
        out.keys[at] = (fabsf(x[i]) < threshold ? kRaisedKey : 0) | word << 32 | number;
        out.values[at++] = copysignf(fmaxf(fabsf(x[i]), threshold), x[i]) * usual;
      }
    }
  }
}

// A block a row, of rows drawn evenly over all: adds up what is small in them, and what each threshold would keep.
template <bool kTilt>
__global__ void __launch_bounds__(kThreads, 3)
    sample_kernel(const Head head, const Exponentials exponentials, const Slopes* slopes, const float* usual,
                  float tolerance, const SparseRows out) {
  const int64_t drawn = int64_t(blockIdx.x) * head.count + mix(out.first_row + blockIdx.x) % head.count;
  const int n = static_cast<int>(drawn / gridDim.x), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Row<kTilt> row(head, exponentials, slopes[n], *usual, n, out.first_row + n);
  if (row.slopes.zero()) return;
  SparseTotals& totals = out.sample->totals[warp];
  if (!row.is_readable()) {
    if (lane == 0) add_row(out, kLevels + 1, 0, totals);
    return;
  }
  __shared__ Counts counts;
  clear(counts, row.vectors);
  __syncthreads();
  count(row, counts);
  __syncthreads();
  const unsigned long long lengths = lengths_of(counts, warp);
  const int power = power_of_row(row, counts, warp + 1, tolerance), kept = drawn_by(counts, min(power, kLevels));
  if (lane == 0) {
    atomicAdd(&out.sample->lengths[warp], lengths);
    add_row(out, power, kept, totals);
  }
  if (threadIdx.x == 0) {
    atomicAdd(&out.sample->rest, static_cast<unsigned long long>(ldexpf(rest_of(counts), kRestBits)));
  }
}

// A block a row. Where in the pool its elements lie depends on which block is first, not what they are, nor their
// order. A block that ends because limits are passed, or finds no room, leaves what the host will not look at: totals
// only grow, so they tell the host what they told the block.
template <bool kTilt>
__global__ void __launch_bounds__(kThreads, 3)
    sparse_kernel(const Head head, const Exponentials exponentials, const Slopes* slopes, const float* usual,
                  float tolerance, const SparseRows out) {
  const int n = blockIdx.x, number = out.first_row + n, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const Row<kTilt> row(head, exponentials, slopes[n], *usual, n, number);
  if (row.slopes.zero()) {
    if (thread == 0) put_row(out, n, 0, 0);
    return;
  }
  const int first = power_of_all(out, tolerance);
  const bool too_flat =
      first > kLevels || are_passed(out.limits, out.sample->totals[first - 1], out.sampled, head.count);
  if (too_flat || !row.is_readable()) {
    if (thread == 0) take_room(out, n, kLevels + 1, 0);
    return;
  }
  __shared__ Counts counts;
  __shared__ int starts[kTurns * kWarps];
  __shared__ int power;
  __shared__ int64_t place;
  __shared__ bool ends;
  clear(counts, row.vectors);
  if (thread == 0) ends = are_passed(out.limits);
  __syncthreads();
  if (ends) return;
  count(row, counts);
  __syncthreads();
  if (warp == 0) {
    const int own = power_of_row(row, counts, first, tolerance), kept = drawn_by(counts, min(own, kLevels));
    if (lane == 0) {
      power = own;
      place = take_room(out, n, own, kept);
    }
  }
  __syncthreads();
  if (place >= 0) write(row, counts, power, place, number, *usual, starts, out);
}

}  // namespace

cudaError_t sparse_rows(const Head& head, const Exponentials& exponentials, const float4* slopes, bool tilted,
                        const float* usual, float tolerance, const SparseRows& out, cudaStream_t stream) {
  if (head.V > kSparseWords || exponentials.split < head.V) return cudaErrorInvalidValue;
  const auto launch = [&](auto* sample, auto* find) {
    const auto* by_row = reinterpret_cast<const Slopes*>(slopes);
    sample<<<out.sampled, kThreads, 0, stream>>>(head, exponentials, by_row, usual, tolerance, out);
    find<<<head.count, kThreads, 0, stream>>>(head, exponentials, by_row, usual, tolerance, out);
  };
  tilted ? launch(sample_kernel<true>, sparse_kernel<true>) : launch(sample_kernel<false>, sparse_kernel<false>);
  return cudaGetLastError();
}

}  // namespace grpo_fast
