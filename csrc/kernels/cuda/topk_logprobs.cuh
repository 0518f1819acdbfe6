// Top-k and log-sum-exp of rows of logits, one pass; topk.cuh says how. NOT YET RUN ON A GPU: compiled for three
// architectures, and its logic tried on the host with threads emulated, in shuffled orders.
#pragma once

#include "topk.cuh"

namespace pyargs::cuda {

// The last block of a row: choose among the survivors of all chunks, merge the sums, write the results.
__device__ __noinline__ void finish_row(TopkShared& shared, TopkWorkspace work, int64_t row, int chunks, int k,
                                        float* logprobs, int64_t* ids, float* logsumexp) {
  survivors_of_row(shared, work, row, chunks, k, 1);
  const Ranked best = ranked(shared, k);
  if (best.rank < k) {
    const float max = shared.warp_max[0], log_sum = log_of_sum(shared.warp_sum[0]);
    const float value = float_of(key_bits(best.key));
    ids[row * k + best.rank] = key_index(best.key);
    logprobs[row * k + best.rank] = (value - max) - log_sum;  // NaN where the row holds NaN or +inf, or only -inf
    if (best.rank == 0) logsumexp[row] = value == INFINITY ? INFINITY : max + log_sum;
  }
}

template <Dtype dtype>
__global__ void __launch_bounds__(kTopkThreads, 4)
    topk_logprobs_kernel(const void* logits, int64_t vocab, int64_t row_stride, uint32_t chunks, int k, float* logprobs,
                         int64_t* ids, float* logsumexp, TopkWorkspace work) {
  PYARGS_SHARED(TopkShared, shared);
  const uint32_t row = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const int64_t first = static_cast<int64_t>(chunk) * kTopkChunk;
  const int n = static_cast<int>(vocab - first < kTopkChunk ? vocab - first : kTopkChunk);
  const char* data = static_cast<const char*>(logits) + (row * row_stride + first) * TopkElements<dtype>::kSize;
  scan_chunk<dtype>(shared, work, blockIdx.x, data, first, n, k, true);
  if (is_last(shared, work.tickets + row, chunks)) {
    finish_row(shared, work, row, static_cast<int>(chunks), k, logprobs, ids, logsumexp);
  }
}

}  // namespace pyargs::cuda
