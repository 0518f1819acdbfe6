// Rewards of a row's candidates, combination, choice: one block for each row, one warp for each candidate (two where k
// is above 32). NOT YET RUN ON A GPU.
//
// The user's weight and bias go to shared memory as float32, a tile at a time, and all warps read them there; features
// are read once, 8 elements to a lane. A lane always adds the same elements in the same order, so a row's result
// depends neither on its batch nor on where it lies in memory. Without a second block to a row there is no workspace
// and no ticket.
#pragma once

#include "../rows.h"
#include "elements.cuh"

namespace pyargs::cuda {

constexpr int kScoreSteps = 8;  // of H in shared memory at a time, each kWarpElements

struct ScoreShared {
  float weight[kScoreSteps * kStepFloats], bias[kScoreSteps * kStepFloats];
  float reward[kMaxTopK];
};

template <Activation activation>
__device__ __forceinline__ float activated(float x) {
  if (activation == Activation::kRelu) return x < 0.0f ? 0.0f : x;  // NaN stays
  if (activation == Activation::kLeakyRelu) return x < 0.0f ? 0.2f * x : x;
  if (activation == Activation::kGelu) return 0.5f * x * (1.0f + erff(x * 0.70710678f));
  return x;
}

__device__ __forceinline__ bool is_stop(const ScoreRows& a, int64_t id) {
  for (int64_t e = 0; e < a.stops; ++e) {
    if (a.stop[e] == id) return true;
  }
  return false;
}

__device__ __forceinline__ float score_of(const ScoreRows& a, int64_t row, int j, const float* reward) {
  const float logprob = a.logprobs[row * a.k + j], weight = a.reward_weight[row];
  return weight == 0.0f ? logprob : logprob + weight * reward[j];
}

// The slot that a warp chooses among k <= 64 scores; -1 if one is NaN. Called by the whole first warp.
__device__ __forceinline__ int choose(const ScoreRows& a, int64_t row, const float* reward) {
  uint64_t best = 0;  // sorts as the score, then the lower slot; 0 is less than any
  uint32_t broken = 0;
  for (int j = static_cast<int>(threadIdx.x); j < a.k; j += 32) {
    const float score = score_of(a, row, j, reward);
    const uint64_t key = topk_key(bits_of(score), static_cast<uint32_t>(j));
    best = key > best ? key : best;
    broken += score != score ? 1u : 0u;
  }
  broken = __reduce_add_sync(0xffffffffu, broken);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const uint64_t other = __shfl_xor_sync(0xffffffffu, best, distance);
    best = other > best ? other : best;
  }
  if (broken > 0) return -1;
  const int slot = static_cast<int>(key_index(best));
  const float top = score_of(a, row, slot, reward);
  if (a.uniform == nullptr || top == -INFINITY) return slot;
  if (top == INFINITY) return -1;  // no distribution
  // k is small, and sums in order are the same for every batch: each lane adds all of them.
  double total = 0.0;
  for (int j = 0; j < a.k; ++j) total += exp((static_cast<double>(score_of(a, row, j, reward)) - top) / a.temperature);
  double cumulated = 0.0;
  int last = slot;
  for (int j = 0; j < a.k; ++j) {
    const double p = exp((static_cast<double>(score_of(a, row, j, reward)) - top) / a.temperature);
    if (p > 0.0) last = j;
    cumulated += p / total;
    if (cumulated > a.uniform[row]) return j;
  }
  return last;
}

template <Dtype dtype, Activation activation>
__global__ void __launch_bounds__(1024, 1) score_select_kernel(ScoreRows a) {
  __shared__ ScoreShared shared;
  const int64_t row = blockIdx.x;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  if (a.finished[row]) {
    for (int j = static_cast<int>(threadIdx.x); j < a.k; j += static_cast<int>(blockDim.x))
      a.reward[row * a.k + j] = 0.0f;
    if (threadIdx.x == 0) {
      a.token[row] = a.pad_id;
      a.slot[row] = 0;
      a.finished_out[row] = true;
    }
    return;
  }
  const int64_t users = a.weight_rows > a.bias_rows ? a.weight_rows : a.bias_rows;
  const bool unknown = users > 1 && (a.user[row] < 0 || a.user[row] >= users);
  const int64_t weight_row = a.weight_rows > 1 && !unknown ? a.user[row] : 0;
  const int64_t bias_row = a.bias_rows > 1 && !unknown ? a.user[row] : 0;

  float sums[2] = {0.0f, 0.0f};  // of candidates warp and warp + warps
  constexpr int kTile = kScoreSteps * kWarpElements;
  for (int64_t start = 0; start < a.hidden && !unknown; start += kTile) {
    const int n = static_cast<int>(a.hidden - start < kTile ? a.hidden - start : kTile);
    const int steps = (n + kWarpElements - 1) / kWarpElements;
    __syncthreads();  // everybody is done with the tile before
    for (int i = static_cast<int>(threadIdx.x); i < steps * kWarpElements; i += static_cast<int>(blockDim.x)) {
      // Zeros behind the end: 0 * activation(0 + 0) adds nothing.
      const bool there = i < n;
      shared.weight[place(i)] =
          there ? element(a.weight_dtype, a.weight, weight_row * a.weight_stride + start + i) : 0.0f;
      shared.bias[place(i)] =
          there && a.bias ? element(a.bias_dtype, a.bias, bias_row * a.bias_stride + start + i) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int j = warp + c * warps;
      if (j >= a.k) continue;
      const int64_t at = row * a.features_stride_b + j * a.features_stride_k + start;
      for (int step = 0; step < steps; ++step) {
        const int i = step * kWarpElements + lane * kLaneElements;
        float x[kLaneElements];
        load_elements<dtype>(a.features, at + i, n - i, x);
#pragma unroll
        for (int e = 0; e < kLaneElements; ++e) {
          const int in_tile = step * kStepFloats + e * kLanePitch + lane;
          sums[c] += shared.weight[in_tile] * activated<activation>(x[e] + shared.bias[in_tile]);
        }
      }
    }
  }
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int j = warp + c * warps;
    float sum = sums[c];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (lane != 0 || j >= a.k) continue;
    sum = unknown ? NAN : sum * a.scale;
    if (a.stop_reward && !unknown && is_stop(a, a.ids[row * a.k + j])) sum = a.stop_reward[row];
    shared.reward[j] = sum;
    a.reward[row * a.k + j] = sum;
  }
  __syncthreads();
  if (warp != 0) return;
  const int slot = unknown ? -1 : choose(a, row, shared.reward);
  if (lane != 0) return;
  a.slot[row] = slot;
  a.token[row] = slot < 0 ? a.pad_id : a.ids[row * a.k + slot];
  a.finished_out[row] = slot < 0 || is_stop(a, a.ids[row * a.k + slot]);
}

}  // namespace pyargs::cuda
