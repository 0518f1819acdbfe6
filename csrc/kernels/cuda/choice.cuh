// The choice of the next token by the first warp of a block, among k <= 64 scored candidates.
#pragma once

#include "../choice.h"
#include "platform.h"

namespace pyargs::cuda {

// The slot that a warp chooses; -1 if there is none to choose. Called by the whole first warp. k is small, and sums in
// order are the same for every batch: where it samples, each lane adds all of them.
__device__ __forceinline__ int choose_by_warp(const ChoiceRows& a, int64_t row, const float* logprobs,
                                              const float* reward) {
  const int lane = static_cast<int>(threadIdx.x);
  const Leader own = leader_of(a, row, logprobs, reward, lane, 32);
  // Sorts as the score, then the lower slot; 0 is less than any.
  uint64_t best = lane < candidates_of(a, row) ? topk_key(bits_of(own.score), static_cast<uint32_t>(own.slot)) : 0;
  const bool broken = __reduce_add_sync(0xffffffffu, own.broken ? 1u : 0u) > 0;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const uint64_t other = __shfl_xor_sync(0xffffffffu, best, distance);
    best = other > best ? other : best;
  }
  return choose(a, row, logprobs, reward, {static_cast<int>(key_index(best)), float_of(key_bits(best)), broken});
}

}  // namespace pyargs::cuda
