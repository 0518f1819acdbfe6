// Top-k and log-sum-exp of rows of logits, one pass; topk.cuh says how. NOT YET RUN ON A GPU: compiled for three
// architectures, and its logic tried on the host with threads emulated, in shuffled orders.
#pragma once

#include "topk.cuh"

namespace pyargs::cuda {

// The last block of a row: choose among the survivors of all chunks, merge the sums, write the results.
__device__ __noinline__ void finish_row(TopkShared& shared, TopkWorkspace work, int64_t row, int64_t chunks, int k,
                                        float* logprobs, int64_t* ids, float* logsumexp) {
  survivors_of_row(shared, work, row, chunks, k);
  if (threadIdx.x < 32) sum_of_row(shared, work, row, chunks, 0);
  __syncthreads();
  const float max = shared.warp_max[0], log_sum = logf(shared.warp_sum[0]);
  const Ranked best = ranked(shared, k);
  if (best.rank < k) {
    const float value = float_of(key_bits(best.key));
    ids[row * k + best.rank] = key_index(best.key);
    logprobs[row * k + best.rank] = (value - max) - log_sum;  // NaN where the row holds NaN or +inf, or only -inf
    if (best.rank == 0) logsumexp[row] = value == INFINITY ? INFINITY : max + log_sum;
  }
}

template <Dtype dtype>
__global__ void __launch_bounds__(kTopkThreads, 3)
    topk_logprobs_kernel(const void* logits, int64_t vocab, int64_t row_stride, int64_t chunks, int k, float* logprobs,
                         int64_t* ids, float* logsumexp, TopkWorkspace work) {
  PYARGS_SHARED(TopkShared, shared);
  const int64_t row = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const int64_t first = chunk * kTopkChunk;
  const int n = static_cast<int>(vocab - first < kTopkChunk ? vocab - first : kTopkChunk);
  const char* data = static_cast<const char*>(logits) + (row * row_stride + first) * TopkLoad<dtype>::kSize;
  const TopkElements<dtype> elements(data, n);
  survivors_of_chunk(shared, elements, data, first, n, k);
  const int64_t part = row * chunks + chunk;
  leave_survivors(shared, work, part);
  leave_sum(shared, work, part, elements.max, elements.sum);
  if (is_last(shared, work.tickets + row, chunks)) finish_row(shared, work, row, chunks, k, logprobs, ids, logsumexp);
}

}  // namespace pyargs::cuda
