// Rewards of a row's candidates, combination, choice: one block for each row, one warp for each candidate (two where k
// is above 32). NOT YET RUN ON A GPU.
//
// The user's weight and bias go to shared memory as float32, a tile at a time, and all warps read them there; features
// are read once, 8 elements to a lane. A lane always adds the same elements in the same order, so a row's result
// depends neither on its batch nor on where it lies in memory. Without a second block to a row there is no workspace
// and no ticket.
#pragma once

#include "choice.cuh"
#include "elements.cuh"

namespace pyargs::cuda {

constexpr int kScoreSteps = 8;  // of H in shared memory at a time, each kWarpElements

struct ScoreShared {
  float weight[kScoreSteps * kWarpElements], bias[kScoreSteps * kWarpElements];
  float reward[kMaxTopK];
  double chance[kMaxTopK];
  int count;
};

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

template <Dtype dtype, Activation activation>
__global__ void __launch_bounds__(1024, 1) score_select_kernel(ScoreRows a) {
  PYARGS_SHARED(ScoreShared, shared);
  const int64_t row = blockIdx.x;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  if (a.finished[row]) return pad_row(a, row, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
  const int64_t users = a.weight_rows > a.bias_rows ? a.weight_rows : a.bias_rows;
  const bool unknown = users > 1 && (a.user[row] < 0 || a.user[row] >= users);
  const int64_t weight_row = a.weight_rows > 1 && !unknown ? a.user[row] : 0;
  const int64_t bias_row = a.bias_rows > 1 && !unknown ? a.user[row] : 0;

  int count = candidates_of(a, row);
  if (a.state.own_k) {
    if (warp == 0) count = count_by_warp(a, row, a.logprobs + row * a.logprobs_stride, shared.chance);
    if (threadIdx.x == 0) shared.count = count;
    __syncthreads();
    count = shared.count;
  }
  float sums[2] = {0.0f, 0.0f};  // of candidates warp and warp + warps
  constexpr int kTile = kScoreSteps * kWarpElements;
  constexpr int kAhead = 4 / Elements<dtype>::kVectors;  // steps: as many as 4 loads, all on their way at once
  for (int64_t start = 0; start < a.hidden && !unknown; start += kTile) {
    const int n = static_cast<int>(a.hidden - start < kTile ? a.hidden - start : kTile);
    const int steps = (n + kWarpElements - 1) / kWarpElements;
    __syncthreads();  // everybody is done with the tile before
    for (int i = static_cast<int>(threadIdx.x); i < 32 * steps; i += static_cast<int>(blockDim.x)) {
      // Zeros behind the end: 0 * activation(0 + 0) adds nothing.
      const int first = i * kLaneElements, step = i / 32 * kWarpElements;
      to_lane(shared.weight + step, i % 32, a.weight_dtype, a.weight, weight_row * a.weight_stride + start + first,
              n - first);
      to_lane(shared.bias + step, i % 32, a.bias_dtype, a.bias, bias_row * a.bias_stride + start + first,
              a.bias ? n - first : 0);
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int j = warp + c * warps;
      if (j >= count) continue;
      const int64_t at = row * a.features_stride_b + j * a.features_stride_k + start;
      for (int step = 0; step < steps; step += kAhead) {
        Elements<dtype> x[kAhead];
#pragma unroll
        for (int s = 0; s < kAhead; ++s) {
          const int i = (step + s) * kWarpElements + lane * kLaneElements;
          x[s] = load_elements<dtype>(a.features, at + i, n - i);
        }
#pragma unroll
        for (int s = 0; s < kAhead; ++s) {
          if (step + s >= steps) break;
#pragma unroll
          for (int e = 0; e < kLaneElements; ++e) {
            const int in_tile = (step + s) * kWarpElements + 32 * e + lane;
            sums[c] += shared.weight[in_tile] * activated<activation>(x[s][e] + shared.bias[in_tile]);
          }
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
    if (j >= count) {
      sum = 0.0f;
    } else if (a.stop_reward && !unknown && is_stop(a, row, a.ids[row * a.ids_stride + j])) {
      sum = a.stop_reward[row];
    }
    shared.reward[j] = sum;
    if (a.reward) a.reward[row * a.k + j] = sum;
  }
  __syncthreads();
  if (warp != 0) return;
  const int slot = unknown ? -1 : choose_by_warp(a, row, count, a.logprobs + row * a.logprobs_stride, shared.reward);
  if (lane == 0) write_choice(a, row, slot, a.ids + row * a.ids_stride, count, shared.reward);
}

}  // namespace pyargs::cuda
