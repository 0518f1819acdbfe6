// Launch of the top-k kernel. Free of torch, so that nvcc needs none of its headers.
#include "launch.h"
#include "topk_logprobs.cuh"

namespace pyargs::cuda {
namespace {

int64_t chunks_of(int64_t vocab) { return (vocab + kTopkChunk - 1) / kTopkChunk; }

template <Dtype dtype>
void launch(const void* logits, int64_t batch, int64_t vocab, int64_t row_stride, int k, float* logprobs, int64_t* ids,
            float* logsumexp, const TopkWorkspace& work, cudaStream_t stream) {
  const int64_t chunks = chunks_of(vocab);
  PYARGS_LAUNCH(topk_logprobs_kernel<dtype>, static_cast<unsigned>(batch * chunks), kTopkThreads, stream, logits, vocab,
                row_stride, chunks, k, logprobs, ids, logsumexp, work);
}

}  // namespace

size_t topk_workspace_bytes(int64_t batch, int64_t vocab) {
  const size_t parts = static_cast<size_t>(batch * chunks_of(vocab));
  return parts * (kTopkKept * sizeof(uint64_t) + 2 * sizeof(float) + sizeof(int)) + batch * sizeof(uint32_t);
}

const char* topk_logprobs(const void* logits, Dtype dtype, int64_t batch, int64_t vocab, int64_t row_stride, int k,
                          float* logprobs, int64_t* ids, float* logsumexp, void* workspace, int device, void* stream) {
  const int64_t parts = batch * chunks_of(vocab);
  if (parts > INT32_MAX) return "too many rows for one launch";
  const OnDevice current(device);
  if (current.error() != cudaSuccess) return text_of(current.error());

  TopkWorkspace work;
  work.keys = static_cast<uint64_t*>(workspace);
  work.maxima = reinterpret_cast<float*>(work.keys + parts * kTopkKept);
  work.sums = work.maxima + parts;
  work.counts = reinterpret_cast<int*>(work.sums + parts);
  work.tickets = reinterpret_cast<uint32_t*>(work.counts + parts);
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  // A call owns its workspace, so that streams cannot meet in it; a CUDA graph replays this node too.
  cudaError_t error = cudaMemsetAsync(work.tickets, 0, batch * sizeof(uint32_t), queue);
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
