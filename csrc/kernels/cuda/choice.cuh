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

// The slot that a warp chooses among the first `count` candidates; -1 if there is none to choose. Called by the whole
// first warp. k is small, and sums in order are the same for every batch: where it samples, each lane adds all of them.
__device__ __forceinline__ int choose_by_warp(const ChoiceRows& a, int64_t row, int count, const float* logprobs,
                                              const float* reward) {
  const int lane = static_cast<int>(threadIdx.x);
  const Leader own = leader_of(a, row, count, logprobs, reward, lane, 32);
  // Sorts as the score, then the lower slot; 0 is less than any.
  uint64_t best = lane < count ? topk_key(bits_of(own.score), static_cast<uint32_t>(own.slot)) : 0;
  const bool broken = __reduce_add_sync(0xffffffffu, own.broken ? 1u : 0u) > 0;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const uint64_t other = __shfl_xor_sync(0xffffffffu, best, distance);
    best = other > best ? other : best;
  }
  const int slot =
      choose(a, row, count, logprobs, reward, {static_cast<int>(key_index(best)), float_of(key_bits(best)), broken});
  __syncwarp();  // all have read the row's state, which one of them will write
  return slot;
}

}  // namespace pyargs::cuda
