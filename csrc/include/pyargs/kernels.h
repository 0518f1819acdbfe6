// The kernels of a guided step on a CPU: the k best tokens, the rewards of the candidates and the choice. The contracts
// in full are those of pyargs/ops, which has each of them in plain Python too.
//
// What they are told are pointers and sizes. B is the number of rows: requests that decode together.
//   - The memory is the caller's, aligned as its elements are. Nothing is kept behind a call, and nothing may overlap
//     what is written to.
//   - Arrays are dense in row-major order; where there is a stride, in elements, rows may lie that far apart.
//   - Null, where a comment allows it, says that something is not there; so begin with `ScoreRows rows{};`.
//   - Any thread may call any function. Rows are shared out among the threads of threads.h, and a row's result depends
//     neither on their number nor on the other rows.
//   - Sizes that do not fit raise std::runtime_error. Errors in the data do not: a user out of range, a score that is
//     NaN, +inf or beyond float32 (-inf though neither log-prob nor reward is) and a count outside of 1 to k finish the
//     row, with slot -1 and pad_id for a token.
#pragma once

#include <cstdint>

namespace pyargs {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

enum class Activation : int { kIdentity = 0, kRelu = 1, kGelu = 2, kLeakyRelu = 3 };  // erf form; slope 0.2

// Top-k never asks for more than this; larger k is refused.
constexpr int kMaxTopK = 64;

constexpr int kChosen = 5;  // numbers of a choice: token, slot, reward, spread, finished

// What rows keep from one step to the next: a kernel brings it up to date where it chooses. All are [B], or null.
struct RowState {
  int64_t* step;         // steps so far; null: nothing is kept
  const int64_t* limit;  // the most steps
  int64_t *token, *slot;
  double* chosen;  // [B, kChosen]
  bool* finished;
  float *so_far, *total;  // reward of the text so far; sum of rewards, whose mean then counts
  const float* noise;     // [B, noises], of each step its own; instead of uniform
  int64_t noises;
  const int64_t* own_k;         // the row's candidates before it is filtered, instead of count
  const double *top_p, *min_p;  // given with own_k
};

// How the next token is chosen among k scored candidates, by log-prob + reward_weight * reward, and where the choice
// goes: to `state` if that has a step, or to the last four.
struct ChoiceRows {
  int64_t k;
  const float *reward_weight, *uniform;  // [B], [B] or null: of [0, 1), for sampling
  const int64_t* count;                  // [B] or null: of the row's candidates, the first that may be chosen
  const bool* finished;                  // [B]: rows that get pad_id, and are not read
  const int64_t* stop;                   // [B, stops], or [stops] with a stride of 0: ids that finish a row
  int64_t stops, stop_stride, pad_id;    // stride in ids
  double temperature;                    // of sampling, where uniform is given
  const float* row_temperature;          // [B], instead of temperature, or null
  int64_t *token, *slot;                 // [B]; the slot is the candidate's place
  float* reward;                         // [B, k]
  bool* finished_out;                    // [B]
  RowState state;
};

// Candidate j of row b has the reward scale * sum_h weight[u, h] * activation(features[b, j, h] + bias[u, h]) for the
// row's user u.
struct ScoreRows : ChoiceRows {
  const void *features, *weight, *bias;  // [B, k, H], [W, H], [U, H] or null
  Dtype features_dtype, weight_dtype, bias_dtype;
  int64_t features_stride_b, features_stride_k, weight_stride, bias_stride;
  int64_t hidden, weight_rows, bias_rows, bank_rows;  // H; users that each of them has; 0 or 1: the same for all
  const int64_t *user, *ids;                          // [B], [B, k]
  const float *logprobs, *stop_reward;                // [B, k], [B] or null: of candidates in `stop`
  int64_t logprobs_stride, ids_stride;
  Activation activation;
  float scale;
};

struct LogitRows {
  const void* logits;  // [B, V]
  Dtype dtype;
  int64_t vocab, row_stride;
};

struct TokenwiseRows : ChoiceRows {
  LogitRows policy, rewards;  // logits of both; V is the same
};

// The first layer of every row's own MLP: out[b, j, h] = sum_d bank[user[b], h, d] * hidden[b, j, d]; NaN for a user
// out of range.
struct UserMlpRows {
  const void *hidden, *bank;  // [B, k, D], [U, H, D]
  Dtype hidden_dtype, bank_dtype;
  int64_t hidden_stride_b, hidden_stride_k, bank_stride_u, bank_stride_h;
  int64_t k, dim, units, users;  // k, D, H, U
  const int64_t* user;           // [B]
  float* out;                    // [B, k, H]
};

constexpr int kMaxCommitted = 256;  // tensors: keys and values of 128 layers

// Of the branches that stand behind every row's prefix in somebody's own cache, the one at `slot` becomes the prefix's
// next token, in all tensors at once. (pyargs::Cache of stack.h has its own.)
struct CommitRows {
  void* states[kMaxCommitted];  // each [B, heads, capacity, head_dim], all alike
  int64_t count, batch, heads;
  int64_t stride_b, stride_h, stride_t, bytes;  // in bytes; of one place of one head
  const int64_t *slot, *length;                 // [B], [B]; a negative slot leaves its row alone
};

namespace cpu {

// The k largest of each row's logits, equal ones by their ids: logprobs and ids [B, k], logsumexp [B]. 1 <= k <= 64.
void topk_logprobs(const LogitRows& rows, int64_t batch, int64_t k, float* logprobs, int64_t* ids, float* logsumexp);

// Rewards of a head and the choice.
void score_select(const ScoreRows& rows, int64_t batch);

// The choice among the k best tokens of the policy, whose rewards are another model's log-probs.
void tokenwise_select(const TokenwiseRows& rows, int64_t batch);

void user_mlp(const UserMlpRows& rows, int64_t batch);

void commit(const CommitRows& rows, int64_t capacity);

}  // namespace cpu

// Which code is used: "default", "avx2", "avx512", "avx512_vnni" or "avx512_bf16", on Arm "default" or "dotprod"; at
// first the best that this CPU has and that was built. Results of one differ from those of another by rounding.
const char* cpu_capability_name();

// Uses another one; std::invalid_argument for another name, and for one that this CPU or this build lacks. Not while
// another thread computes.
void set_cpu_capability(const char* name);

}  // namespace pyargs
