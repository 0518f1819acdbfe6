// From two rows of logits, the policy's and those of a model whose log-probs are the rewards, to the chosen token: one
// launch. NOT YET RUN ON A GPU: compiled for three architectures, and its logic tried on the host with threads
// emulated, in shuffled orders.
//
// Blocks go over chunks as topk.cuh says, for each row those of the policy and then those of the rewards, of which only
// the sum is wanted; the block that finishes last of both chooses. In the workspace row 2 b is the policy's of row b,
// and row 2 b + 1 the rewards'.
#pragma once

#include "choice.cuh"
#include "topk.cuh"

namespace pyargs::cuda {

struct TokenwiseShared {
  TopkShared topk;
  float logprobs[kMaxTopK], reward[kMaxTopK];
  int64_t ids[kMaxTopK];
  double chance[kMaxTopK];
};

template <Dtype dtype>
__device__ __forceinline__ void tokenwise_chunk(TopkShared& shared, const LogitRows& logits, int64_t row,
                                                uint32_t chunk, bool policy, int k, const TopkWorkspace& work) {
  const int64_t first = static_cast<int64_t>(chunk) * kTopkChunk;
  const int n = static_cast<int>(logits.vocab - first < kTopkChunk ? logits.vocab - first : kTopkChunk);
  const char* data =
      static_cast<const char*>(logits.logits) + (row * logits.row_stride + first) * TopkElements<dtype>::kSize;
  scan_chunk<dtype>(shared, work, blockIdx.x, data, first, n, k, policy);
}

// The last block of a row: its candidates, their log-probs and rewards, and the choice.
__device__ __forceinline__ void select_row(TokenwiseShared& shared, const TokenwiseRows& a, int64_t row, int chunks,
                                           const TopkWorkspace& work) {
  const int k = static_cast<int>(a.k), warp = static_cast<int>(threadIdx.x) / 32;
  survivors_of_row(shared.topk, work, 2 * row, chunks, k, 2);
  const Ranked best = ranked(shared.topk, k);
  if (best.rank < k) {
    const float* max = shared.topk.warp_max;
    const float* sum = shared.topk.warp_sum;
    const int64_t id = key_index(best.key);
    const bool there = best.rank < candidates_of(a, row);
    const float logit = there ? element(a.rewards.dtype, a.rewards.logits, row * a.rewards.row_stride + id) : 0.0f;
    const float reward = there ? (logit - max[1]) - log_of_sum(sum[1]) : 0.0f;
    shared.ids[best.rank] = id;
    shared.logprobs[best.rank] = (float_of(key_bits(best.key)) - max[0]) - log_of_sum(sum[0]);
    shared.reward[best.rank] = reward;
    if (a.reward) a.reward[row * k + best.rank] = reward;
  }
  __syncthreads();
  if (warp != 0) return;
  const int count = count_by_warp(a, row, shared.logprobs, shared.chance);
  const int slot = choose_by_warp(a, row, count, shared.logprobs, shared.reward);
  if (threadIdx.x == 0) write_choice(a, row, slot, shared.ids, count, shared.reward);
}

__global__ void __launch_bounds__(kTopkThreads, 4)
    tokenwise_select_kernel(TokenwiseRows a, uint32_t chunks, TopkWorkspace work) {
  PYARGS_SHARED(TokenwiseShared, shared);
  const uint32_t row = blockIdx.x / (2 * chunks), chunk = blockIdx.x % chunks;
  const bool policy = blockIdx.x / chunks % 2 == 0;
  if (a.finished[row]) {
    if (policy && chunk == 0) pad_row(a, row, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
    return;
  }
  const LogitRows logits = policy ? a.policy : a.rewards;
  const int k = static_cast<int>(a.k);
  switch (logits.dtype) {
    case Dtype::kFloat32:
      tokenwise_chunk<Dtype::kFloat32>(shared.topk, logits, row, chunk, policy, k, work);
      break;
    case Dtype::kBFloat16:
      tokenwise_chunk<Dtype::kBFloat16>(shared.topk, logits, row, chunk, policy, k, work);
      break;
    case Dtype::kFloat16:
      tokenwise_chunk<Dtype::kFloat16>(shared.topk, logits, row, chunk, policy, k, work);
      break;
  }
  if (is_last(shared.topk, work.tickets + row, 2 * chunks)) {
    select_row(shared, a, row, static_cast<int>(chunks), work);
  }
}

}  // namespace pyargs::cuda
