// The choice of the next token by the first warp of a block, among k <= 64 scored candidates.
#pragma once

#include "../rows.h"
#include "platform.h"

namespace pyargs::cuda {

__device__ __forceinline__ bool is_stop(const ChoiceRows& a, int64_t id) {
  for (int64_t e = 0; e < a.stops; ++e) {
    if (a.stop[e] == id) return true;
  }
  return false;
}

// Log-probs and rewards are those of the row's candidates.
__device__ __forceinline__ float score_of(const ChoiceRows& a, int64_t row, int j, const float* logprobs,
                                          const float* reward) {
  const float logprob = logprobs[j], weight = a.reward_weight[row];
  return weight == 0.0f ? logprob : logprob + weight * reward[j];
}

// No score to choose by: NaN, +inf, or a finite log-prob and reward whose sum is beyond float32. -inf forbids a token.
__device__ __forceinline__ bool broken_score(float score, float logprob, float reward) {
  return !(score < INFINITY) || (score == -INFINITY && logprob != -INFINITY && reward != -INFINITY);
}

// The slot that a warp chooses; -1 if a score is broken. Called by the whole first warp.
__device__ __forceinline__ int choose(const ChoiceRows& a, int64_t row, const float* logprobs, const float* reward) {
  uint64_t best = 0;  // sorts as the score, then the lower slot; 0 is less than any
  uint32_t broken = 0;
  for (int j = static_cast<int>(threadIdx.x); j < a.k; j += 32) {
    const float score = score_of(a, row, j, logprobs, reward);
    const uint64_t key = topk_key(bits_of(score), static_cast<uint32_t>(j));
    best = key > best ? key : best;
    broken += broken_score(score, logprobs[j], reward[j]) ? 1u : 0u;
  }
  broken = __reduce_add_sync(0xffffffffu, broken);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const uint64_t other = __shfl_xor_sync(0xffffffffu, best, distance);
    best = other > best ? other : best;
  }
  if (broken > 0) return -1;
  const int slot = static_cast<int>(key_index(best));
  const float top = score_of(a, row, slot, logprobs, reward);
  if (a.uniform == nullptr || top == -INFINITY) return slot;
  // k is small, and sums in order are the same for every batch: each lane adds all of them.
  double total = 0.0;
  for (int j = 0; j < a.k; ++j) {
    total += exp((static_cast<double>(score_of(a, row, j, logprobs, reward)) - top) / a.temperature);
  }
  double cumulated = 0.0;
  int last = slot;
  for (int j = 0; j < a.k; ++j) {
    const double p = exp((static_cast<double>(score_of(a, row, j, logprobs, reward)) - top) / a.temperature);
    if (p > 0.0) last = j;
    cumulated += p / total;
    if (cumulated > a.uniform[row]) return j;
  }
  return last;
}

// By one thread.
__device__ __forceinline__ void write_choice(const ChoiceRows& a, int64_t row, int slot, const int64_t* ids) {
  a.slot[row] = slot;
  a.token[row] = slot < 0 ? a.pad_id : ids[slot];
  a.finished_out[row] = slot < 0 || is_stop(a, ids[slot]);
}

// What a row gets that had finished before. By all threads of a block.
__device__ __forceinline__ void pad_row(const ChoiceRows& a, int64_t row) {
  for (int j = static_cast<int>(threadIdx.x); j < a.k; j += static_cast<int>(blockDim.x))
    a.reward[row * a.k + j] = 0.0f;
  if (threadIdx.x == 0) {
    a.token[row] = a.pad_id;
    a.slot[row] = 0;
    a.finished_out[row] = true;
  }
}

}  // namespace pyargs::cuda
