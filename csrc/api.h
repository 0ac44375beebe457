// What bindings.cpp calls: plain structs and launchers, no device code. Launchers return CUDA's error code.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace grpo_fast {

enum class DType : int { kFloat32, kBFloat16, kFloat16, kFloat64, kBool, kUInt8, kInt32, kInt64 };

// A contiguous tensor as Python passes it: an address, null for None, and a dtype.
struct Values {
  const void* data;
  DType dtype;
};

// z = u * slope, u = cap * tanh(x * cap_in); without a softcap u = x.
struct LogitOptions {
  bool has_softcap;
  float slope, cap, cap_in;
};

// (B, T, V) logits and their gradient, V contiguous; row n is (n / T, n % T).
struct Rows {
  const void* logits;
  DType dtype;
  void* out;        // null for no gradient; may be the logits
  DType out_dtype;  // that of the logits, or a half precision for float32 logits
  int64_t stride_b, stride_t, out_stride_b, out_stride_t;
  int count;  // B T
  int T;
  int V;
  Values ids;           // per row, the sampled tokens
  const uint8_t* kept;  // per row; null for all
  LogitOptions options;
};

constexpr int kMaxConsumers = 18;

// How rows are laid out on the chip; see resident.cuh.
struct Layout {
  int cluster;    // blocks that share a row
  int consumers;  // warps of a block that do the arithmetic
  int stages;     // chunks of a block's ring
};

int chunk_bytes(const Layout& layout);
int shared_bytes(const Layout& layout);

// B sequences of T tokens each, or of N packed ones.
struct Batch {
  int count;  // B
  int T;
  int N;
  Values mask;          // per token
  Values ends;          // (B,) where each packed sequence ends
  Values entropy_mask;  // per token
};

enum Reduction : int { kByConstant, kByTokens, kBySequence };
enum ScaleRewards : int { kGroup, kBatch, kUnscaled };

struct PlanInputs {
  Values advantages;  // per token or (B,)
  bool per_token_advantages;
  Values rewards;  // (B,), in place of advantages; NaN is unscorable
  int group_size;
  int scale_rewards;
  Values sampler_ratio;  // per token or (B,)
  bool per_token_sampler_ratio;
  int reduction;
  float divisor;
  Values num_items;      // scalar, in place of the divisor
  Values token_weights;  // per token, in place of all that
  float entropy_coef;
  Values entropy_items;  // scalar that the entropy bonus is divided by; null for the tokens that count
};

// What a batch's rows need of their sequences and groups.
struct Plan {
  float* weights;        // (N,) of each token in the sum over tokens; 0 where it does not count
  float* advantages;     // (N,)
  float* sampler_ratio;  // (N,); null for 1
  uint8_t* kept;         // (N,); null where all are
  float* zero_std;       // (B,): 1 where the group has no spread; null without rewards
  float* d_entropy;      // scalar: the upstream gradient of each chosen token's entropy
};

cudaError_t plan(const Batch& batch, const PlanInputs& inputs, const Plan& plan, cudaStream_t stream);

enum Term : int { kClipped, kCispo, kSapo };
enum KLEstimator : int { kNoKL, kK1, kK2, kK3 };

struct LossOptions {
  int term;
  int kl_estimator;
  bool has_dual_clip;
  bool bias_correction;
  float low, high;  // clip bounds of the ratio
  float delta;      // infinite for none
  float dual_clip;
  float beta;
  float tau_pos, tau_neg;
};

// Beside the plan, per token.
struct TokenInputs {
  Values old_logps, ref_logps, entropy_mask;
  Values entropy_threshold;  // scalar
};

// What the rows leave behind, per token.
struct RowResults {
  float* logps;
  float* entropies;
  float* losses;
  float* kls;  // null without a KL term
  float* ratios;
  float* clips;
};

// The loss terms and the gradient of every row.
cudaError_t grpo_loss_rows(const Rows& rows, const Layout& layout, const LossOptions& options, const Plan& plan,
                           const TokenInputs& inputs, bool entropy_bonus, const RowResults& results,
                           cudaStream_t stream);

constexpr int kPartial = 13;  // what a sequence adds to them

// Results from all rows, the loss and then the metrics, in a fixed order. `zero_std` is (B,), or null without rewards;
// `partials` is for max(B, 1) times kPartial numbers and one more.
cudaError_t sum_rows(const Batch& batch, const RowResults& rows, const float* zero_std, float entropy_coef,
                     float* partials, float* results, cudaStream_t stream);

// Per row: log-prob of the sampled token, entropy, and what the backward needs.
struct LogProbs {
  float* logps;
  float* entropies;  // null for none
  float* shifts;
  float* totals;
};

cudaError_t log_probs_rows(const Rows& rows, const Layout& layout, const LogProbs& results, cudaStream_t stream);

// The gradient of the logits from upstream gradients (N,) of log-probs and entropies; the latter may be null.
cudaError_t log_probs_gradient(const Rows& rows, const LogProbs& results, const float* d_logps,
                               const float* d_entropies, cudaStream_t stream);

// Hidden states and the head that makes logits of them, both of one half precision, whose rows begin at multiples of 16
// bytes.
struct Head {
  Values hidden;  // (count, H)
  int64_t hidden_stride;
  Values weight;  // (V, H)
  int64_t weight_stride;
  const float* bias;  // (V,); null for none
  int count, V, H;
  const int64_t* counted;  // a scalar: how many rows there are, if less than `count`; null where the host knows
  Values ids;              // per row, the sampled tokens
  LogitOptions options;
  int multiprocessors;  // of the device
};

// Some words of rows.
struct Words {
  uint16_t* values;  // (count, words), at multiples of 16 bytes; null for none
  int64_t stride;    // a multiple of 8, not less than the number of words
};

// exp2 of a row's logits less a base, in 16 bits each (exponential.cuh); then, in their place, the gradient. For
// bfloat16, and rows without a softcap: they have no digits for more.
struct Exponentials {
  Words first;
  Words rest;    // of the words from `split` on
  int split;     // a multiple of kTileWords
  float* bases;  // (count,)
};

constexpr int kTileWords = 256;
// All words are done for so many rows before the next, so that both, as they are read, stay in L2.
constexpr int kBandRows = 2048;

// What each lane of the product, clusters of blocks that share a row, found of it.
struct Partials {
  float4* values;  // (lanes at most, stride)
  int stride;      // no less than the number of rows
  int* lanes;      // a scalar: how many there were
};

// How many there are of so many rows, and of any number of them at the most.
int linear_lanes(int count, int multiprocessors);
int linear_lanes_at_most(int multiprocessors);

// Rows of a product whose exponentials are to become the gradient of the logits, in bfloat16, in their place.
struct Conversion {
  Head head;
  Exponentials exponentials;
  const float4* slopes;  // (count,)
  bool tilted;           // whether entropies have a gradient too
};

// The product: the statistics of each row, and the exponentials. Where it leaves these, it may convert the rows of
// another product meanwhile; `next_slice` is a scalar that it counts with.
cudaError_t linear_product(const Head& head, const Exponentials& exponentials, const Partials& partials,
                           const Conversion* meanwhile, int* next_slice, cudaStream_t stream);

// What follows from the statistics: log-probs, or the loss, and then the slopes of the gradient, (count,).
cudaError_t linear_log_probs(const Head& head, const Partials& partials, const LogProbs& results, cudaStream_t stream);
cudaError_t linear_loss(const Head& head, const Partials& partials, const LossOptions& options, const Plan& plan,
                        const TokenInputs& inputs, const RowResults& results, float4* slopes, cudaStream_t stream);
cudaError_t linear_slopes(const Head& head, const LogProbs& results, const uint8_t* kept, const float* d_logps,
                          const float* d_entropies, float4* slopes, cudaStream_t stream);

// The gradient of the logits by the product itself, from slopes that are known before it: in bfloat16, with a softcap
// or without. `place` is where it goes; its bases are not used.
cudaError_t linear_gradient_by_product(const Head& head, const Exponentials& place, const float4* slopes, bool tilted,
                                       cudaStream_t stream);

// The conversion by a kernel of its own: of all rows, or of so many in `which`.
cudaError_t linear_gradient(const Conversion& all, const int64_t* which, int count, cudaStream_t stream);

// Rows are short or long, by the number of their elements, or dense.
struct SparseTotals {
  unsigned long long in_short, in_long;  // elements of those
  unsigned long long longs, dense;       // long rows, and dense ones
};

// From where on most rows are too flat. Long rows count as dense if there is no room for all of them.
struct SparseLimits {
  SparseTotals* totals;                                  // null for no limits
  unsigned long long short_room, long_room, most_dense;  // elements of short rows, and of long ones; rows
};

constexpr int kSparsePowers = 16;  // of two, thresholds; SPARSE_POWERS in reference.py

// Of some of the rows.
struct SparseSample {
  unsigned long long lengths[kSparsePowers], rest;  // what is small, by the power of two that it falls short by
  SparseTotals totals[kSparsePowers];               // with a threshold of 2^-1, 2^-2 and so on
};

// Rows of the gradient as some of their elements: of a row together, in the order of the words. Those of short rows end
// where their room does, and those of long ones begin there.
struct SparseRows {
  int64_t* keys;  // an element's word times 2^32, plus its row, the first being `first_row`; and kRaisedKey
  float* values;
  int64_t* starts;      // (count,) of a row's elements the first,
  int64_t* ends;        // (count,) and what comes after the last; before the first of a dense row, or one without room
  SparseLimits limits;  // totals are 0 before; if these are passed, the search has ended early: nothing else is of use
  int first_row;
  int short_most, long_most;  // most elements of a row
  SparseSample* sample;       // 0 before
  int sampled;                // how many rows that is of, no more than there are
};

constexpr int64_t kRaisedKey = INT64_MIN;  // the sign bit: the element was smaller than the threshold
constexpr int kSparseWords = 262144;       // the most words of a row; MOST_WORDS in Python

// Of exponentials in one place. `usual`: a scalar, how large the sampled tokens' elements are in the root mean square.
cudaError_t sparse_rows(const Head& head, const Exponentials& exponentials, const float4* slopes, bool tilted,
                        const float* usual, float tolerance, const SparseRows& out, cudaStream_t stream);

// What enters the sums: of sum r, the entries e from starts[r] to ends[r], row index[2 e], whatever its sign bit, of a
// matrix by weights[e].
struct Entries {
  const int64_t *starts, *ends;
  const int32_t* index;
  const float* weights;
  SparseLimits limits;  // nothing is written if they are passed; long rows are 0 if there is no room for all of them
};

// out (rows, width), in float32 or bfloat16: sums of rows of a bfloat16 matrix, and `base` (rows, width) if not null,
// which may be `out`. The width is a multiple of 8.
cudaError_t sum_of_rows(const Entries& entries, const Values& matrix, int64_t stride, int rows, int width,
                        const float* base, void* out, DType out_dtype, cudaStream_t stream);

// Multiply rows in place by a scalar on the device; by 1 nothing is touched.
cudaError_t scale_gradient(void* gradient, DType dtype, int64_t stride_b, int64_t stride_t, int count, int T, int V,
                           const float* factor, cudaStream_t stream);

}  // namespace grpo_fast
