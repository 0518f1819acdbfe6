// What the kernels that score candidates share: the rows of a user, activations, and what becomes of the rewards.
#pragma once

#include "choice.cuh"
#include "elements.cuh"

namespace pyargs::cuda {

template <Activation activation>
__device__ __forceinline__ float activated(float x) {
  if (activation == Activation::kRelu) return x < 0.0f ? 0.0f : x;  // NaN stays
  if (activation == Activation::kLeakyRelu) return x < 0.0f ? 0.2f * x : x;
  if (activation == Activation::kGelu) {
    x = x < -100.0f ? -100.0f : x;  // 0 from there on, and -inf * 0 is NaN
    return 0.5f * x * (1.0f + erff(x * 0.70710678f));
  }
  return x;
}

__device__ __forceinline__ float activated(Activation activation, float x) {
  switch (activation) {
    case Activation::kRelu:
      return activated<Activation::kRelu>(x);
    case Activation::kLeakyRelu:
      return activated<Activation::kLeakyRelu>(x);
    case Activation::kGelu:
      return activated<Activation::kGelu>(x);
    default:
      return x;
  }
}

// Where a row's user is in the tables; `unknown` if beyond them.
struct ScoreUser {
  int64_t weight_row, bias_row;
  bool unknown;
};

__device__ __forceinline__ ScoreUser user_of(const ScoreRows& a, int64_t row, int64_t bank_rows = 1) {
  int64_t users = a.weight_rows > a.bias_rows ? a.weight_rows : a.bias_rows;
  users = bank_rows > users ? bank_rows : users;
  const int64_t user = users > 1 ? a.user[row] : 0;
  const bool unknown = user < 0 || user >= users;
  return {a.weight_rows > 1 && !unknown ? user : 0, a.bias_rows > 1 && !unknown ? user : 0, unknown};
}

struct RewardsShared {
  float reward[kMaxTopK];
  double chance[kMaxTopK];
  int count;
};

// How many of the row's candidates may be chosen, filters of its own included. Called by the whole block.
__device__ __forceinline__ int count_by_block(RewardsShared& shared, const ScoreRows& a, int64_t row) {
  if (!a.state.own_k) return candidates_of(a, row);
  if (threadIdx.x < 32) {
    const int count = count_by_warp(a, row, a.logprobs + row * a.logprobs_stride, shared.chance);
    if (threadIdx.x == 0) shared.count = count;
  }
  __syncthreads();
  return shared.count;
}

// The reward of candidate j, where `sum` is that of weight and features.
__device__ __forceinline__ void set_reward(RewardsShared& shared, const ScoreRows& a, int64_t row, int j, int count,
                                           bool unknown, float sum) {
  float reward = unknown ? NAN : sum * a.scale;
  if (j >= count) {
    reward = 0.0f;
  } else if (a.stop_reward && !unknown && is_stop(a, row, a.ids[row * a.ids_stride + j])) {
    reward = a.stop_reward[row];
  }
  shared.reward[j] = reward;
  if (a.reward) a.reward[row * a.k + j] = reward;
}

// The choice by all rewards. Called by the whole block; the first warp works.
__device__ __forceinline__ void choose_of_rewards(const RewardsShared& shared, const ScoreRows& a, int64_t row,
                                                  int count, bool unknown) {
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const int slot = unknown ? -1 : choose_by_warp(a, row, count, a.logprobs + row * a.logprobs_stride, shared.reward);
  if (threadIdx.x == 0) write_choice(a, row, slot, a.ids + row * a.ids_stride, count, shared.reward);
}

}  // namespace pyargs::cuda
