// The choice of the next token by the first warp of a block, among k <= 64 scored candidates.
#pragma once

#include "../choice.h"
#include "platform.h"

namespace pyargs::cuda {

// How many of the row's candidates may be chosen, filters of its own included; 0: none. Called by a whole warp, which
// alone writes `chance`, in shared memory: of all candidates.
__device__ __forceinline__ int count_by_warp(const ChoiceRows& a, int64_t row, const float* logprobs, double* chance) {
  if (!a.state.own_k) return candidates_of(a, row);
  for (int j = static_cast<int>(threadIdx.x) % 32; j < a.k; j += 32) chance[j] = chance_of(logprobs, j);
  __syncwarp();
  return filtered(a, row, chance);
}

// Entry j of an array of 64, of which a lane has entries `lane` and `lane` + 32. Called by the whole warp.
__device__ __forceinline__ double of_lanes(const double (&own)[2], int j) {
  return __shfl_sync(0xffffffffu, j < 32 ? own[0] : own[1], j % 32);
}

// The slot that a warp chooses among the first `count` candidates; -1 if there is none to choose. Called by the whole
// first warp. A lane computes its own candidates' odds and shares; all lanes add all of them in order, as one thread
// does on the CPU, so that the sums are the same bit by bit.
__device__ __forceinline__ int choose_by_warp(const ChoiceRows& a, int64_t row, int count, const float* logprobs,
                                              const float* reward) {
  const int lane = static_cast<int>(threadIdx.x);
  const Leader own = leader_of(a, row, count, logprobs, reward, lane, 32);
  // Sorts as the score, then the lower slot; 0 is less than any.
  uint64_t key = lane < count ? topk_key(bits_of(own.score), static_cast<uint32_t>(own.slot)) : 0;
  const bool broken = __reduce_add_sync(0xffffffffu, own.broken ? 1u : 0u) > 0;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const uint64_t other = __shfl_xor_sync(0xffffffffu, key, distance);
    key = other > key ? other : key;
  }
  const int slot = static_cast<int>(key_index(key));
  const float best = float_of(key_bits(key));
  const int chosen = choose(a, row, {slot, best, broken}, [&](double temperature) {
    const float weight = weight_of(a, row);
    double odds[2], shares[2], total = 0.0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int j = lane + 32 * i;
      odds[i] = j < count ? odds_of(score(logprobs[j], weight, reward[j]), best, temperature) : 0.0;
    }
    for (int j = 0; j < count; ++j) total += of_lanes(odds, j);
#pragma unroll
    for (int i = 0; i < 2; ++i) shares[i] = odds[i] / total;
    return sample(count, uniform_of(a, row), slot, [&](int j) { return of_lanes(shares, j); });
  });
  __syncwarp();  // all have read the row's state, which one of them will write
  return chosen;
}

}  // namespace pyargs::cuda
