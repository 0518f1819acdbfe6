// Launch of the commit kernel. Free of torch.
#include "commit.cuh"
#include "launch.h"

namespace pyargs::cuda {

const char* commit(const CommitRows& rows, int64_t capacity, int device, void* stream) {
  if (rows.batch * rows.heads > INT32_MAX) return "too many rows for one launch";
  const OnDevice current(device);
  if (current.error() != cudaSuccess) return text_of(current.error());
  const dim3 blocks(static_cast<unsigned>(rows.batch * rows.heads), static_cast<unsigned>(rows.count));
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  PYARGS_LAUNCH(commit_kernel, blocks, kCommitThreads, queue, rows, capacity);
  return text_of(cudaGetLastError());
}

}  // namespace pyargs::cuda
