// Rewards of a row's candidates, combination, choice: one block for each row, one warp for each candidate (two where k
// is above 32). NOT YET RUN ON A GPU.
//
// The user's weight and bias go to shared memory as float32, a tile at a time, and all warps read them there; features
// are read once, 8 elements to a lane. A lane always adds the same elements in the same order, so a row's result
// depends neither on its batch nor on where it lies in memory. Without a second block to a row there is no workspace
// and no ticket.
#pragma once

#include "rewards.cuh"

namespace pyargs::cuda {

constexpr int kScoreSteps = 8;  // of H in shared memory at a time, each kWarpElements

struct ScoreShared {
  float weight[kScoreSteps * kWarpElements], bias[kScoreSteps * kWarpElements];
  RewardsShared rewards;
};

template <Dtype dtype, Activation activation>
__global__ void __launch_bounds__(1024, 1) score_select_kernel(ScoreRows a) {
  PYARGS_SHARED(ScoreShared, shared);
  const int64_t row = blockIdx.x;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  if (a.finished[row]) return pad_row(a, row, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
  const ScoreUser user = user_of(a, row);
  const int count = count_by_block(shared.rewards, a, row);
  float sums[2] = {0.0f, 0.0f};  // of candidates warp and warp + warps
  constexpr int kTile = kScoreSteps * kWarpElements;
  constexpr int kAhead = 4 / Elements<dtype>::kVectors;  // steps: as many as 4 loads, all on their way at once
  for (int64_t start = 0; start < a.hidden && !user.unknown; start += kTile) {
    const int n = static_cast<int>(a.hidden - start < kTile ? a.hidden - start : kTile);
    const int steps = (n + kWarpElements - 1) / kWarpElements;
    __syncthreads();  // everybody is done with the tile before
    for (int i = static_cast<int>(threadIdx.x); i < 32 * steps; i += static_cast<int>(blockDim.x)) {
      // Zeros behind the end: 0 * activation(0 + 0) adds nothing.
      const int first = i * kLaneElements, step = i / 32 * kWarpElements;
      to_lane(shared.weight + step, i % 32, a.weight_dtype, a.weight, user.weight_row * a.weight_stride + start + first,
              n - first);
      to_lane(shared.bias + step, i % 32, a.bias_dtype, a.bias, user.bias_row * a.bias_stride + start + first,
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
    if (lane == 0 && j < a.k) set_reward(shared.rewards, a, row, j, count, user.unknown, sum);
  }
  choose_of_rewards(shared.rewards, a, row, count, user.unknown);
}

}  // namespace pyargs::cuda
