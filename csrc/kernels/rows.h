// What the kernels of an op are told, on the CPU and on CUDA: pointers, sizes, strides in elements.
#pragma once

#include "common.h"

namespace pyargs {

enum class Activation : int { kIdentity = 0, kRelu = 1, kGelu = 2, kLeakyRelu = 3 };

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

// How the next token is chosen among k scored candidates, and where the choice goes: to `state`, or to the last four.
struct ChoiceRows {
  int64_t k;
  const float *reward_weight, *uniform;  // [B], [B] or null
  const int64_t* count;                  // [B] or null: of the row's candidates, the first that may be chosen
  const bool* finished;
  const int64_t* stop;                 // [B, stops], or [stops] with a stride of 0
  int64_t stops, stop_stride, pad_id;  // stride in ids
  double temperature;                  // of sampling, where uniform is given
  const float* row_temperature;        // [B], instead of temperature, or null
  int64_t *token, *slot;
  float* reward;  // [B, k]
  bool* finished_out;
  RowState state;
};

struct ScoreRows : ChoiceRows {
  const void *features, *weight, *bias;  // [B, k, H], [W, H], [U, H] or null
  Dtype features_dtype, weight_dtype, bias_dtype;
  int64_t features_stride_b, features_stride_k, weight_stride, bias_stride;
  int64_t hidden, weight_rows, bias_rows, bank_rows;  // users that each of them has; 0 or 1: the same for all
  const int64_t *user, *ids;                          // [B], [B, k]
  const float *logprobs, *stop_reward;                // [B, k], [B] or null
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

struct UserMlpRows {
  const void *hidden, *bank;  // [B, k, D], [U, H, D]
  Dtype hidden_dtype, bank_dtype;
  int64_t hidden_stride_b, hidden_stride_k, bank_stride_u, bank_stride_h;
  int64_t k, dim, units, users;
  const int64_t* user;  // [B]
  float* out;           // [B, k, H]
};

constexpr int kMaxCommitted = 256;  // tensors: keys and values of 128 layers

struct CommitRows {
  void* states[kMaxCommitted];  // each [B, heads, capacity, head_dim], all alike
  int64_t count, batch, heads;
  int64_t stride_b, stride_h, stride_t, bytes;  // in bytes; of one place of one head
  const int64_t *slot, *length;                 // [B], [B]
};

struct BranchRows {
  const void *query, *key, *value;  // [B, heads * groups, k, dim], [B, heads, places, dim] twice
  Dtype dtype;
  int64_t query_stride_b, query_stride_h, query_stride_k;
  int64_t key_stride_b, key_stride_h, key_stride_t, value_stride_b, value_stride_h, value_stride_t;
  int64_t batch;
  int heads, groups, k, places, dim;  // groups: heads of queries to a head of keys
  const int64_t* length;              // [B]
  float scale;
  void* out;  // [B, k, heads * groups, dim]
};

}  // namespace pyargs
