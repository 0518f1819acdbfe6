// Launch of the top-k kernel. Free of torch, so that nvcc needs none of its headers.
#include "launch.h"
#include "tickets.h"
#include "topk_logprobs.cuh"

namespace pyargs::cuda {
namespace {

template <Dtype dtype>
void launch(const void* logits, int64_t batch, int64_t vocab, int64_t row_stride, int k, float* logprobs, int64_t* ids,
            float* logsumexp, const TopkWorkspace& work, cudaStream_t stream) {
  const uint32_t chunks = static_cast<uint32_t>(topk_chunks(vocab));
  PYARGS_LAUNCH(topk_logprobs_kernel<dtype>, static_cast<uint32_t>(batch) * chunks, kTopkThreads, stream, logits, vocab,
                row_stride, chunks, k, logprobs, ids, logsumexp, work);
}

}  // namespace

size_t topk_workspace_bytes(int64_t batch, int64_t vocab) {
  const size_t parts = static_cast<size_t>(batch * topk_chunks(vocab));
  return parts * (kTopkKept * sizeof(uint64_t) + 2 * sizeof(float)) + batch * sizeof(uint32_t);
}

const char* topk_logprobs(const void* logits, Dtype dtype, int64_t batch, int64_t vocab, int64_t row_stride, int k,
                          float* logprobs, int64_t* ids, float* logsumexp, void* workspace, int device, void* stream) {
  const int64_t parts = batch * topk_chunks(vocab);
  if (parts > INT32_MAX) return "too many rows for one launch";
  const OnDevice current(device);
  if (current.error() != cudaSuccess) return text_of(current.error());

  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  TopkWorkspace work = topk_workspace(workspace, batch, vocab);
  cudaError_t error = set_tickets(work.tickets, batch, device, queue);
  if (error == cudaSuccess) {
    switch (dtype) {
      case Dtype::kFloat32:
        launch<Dtype::kFloat32>(logits, batch, vocab, row_stride, k, logprobs, ids, logsumexp, work, queue);
        break;
      case Dtype::kBFloat16:
        launch<Dtype::kBFloat16>(logits, batch, vocab, row_stride, k, logprobs, ids, logsumexp, work, queue);
        break;
      case Dtype::kFloat16:
        launch<Dtype::kFloat16>(logits, batch, vocab, row_stride, k, logprobs, ids, logsumexp, work, queue);
        break;
    }
    error = cudaGetLastError();
  }
  return text_of(error);
}

}  // namespace pyargs::cuda
