// What the kernels of an op are told, on the CPU and on CUDA: pointers, sizes, strides in elements.
#pragma once

#include "common.h"

namespace pyargs {

enum class Activation : int { kIdentity = 0, kRelu = 1, kGelu = 2, kLeakyRelu = 3 };

// How the next token is chosen among k scored candidates, and where the choice goes.
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
};

struct ScoreRows : ChoiceRows {
  const void *features, *weight, *bias;  // [B, k, H], [W, H], [U, H] or null
  Dtype features_dtype, weight_dtype, bias_dtype;
  int64_t features_stride_b, features_stride_k, weight_stride, bias_stride;
  int64_t hidden, weight_rows, bias_rows;
  const int64_t *user, *ids;            // [B], [B, k]
  const float *logprobs, *stop_reward;  // [B, k], [B] or null
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

}  // namespace pyargs
