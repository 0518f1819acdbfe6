// Launch of the kernel that goes from two rows of logits to the token. Free of torch.
#include "launch.h"
#include "tickets.h"
#include "tokenwise_select.cuh"

namespace pyargs::cuda {

const char* tokenwise_select(const TokenwiseRows& rows, int64_t batch, void* workspace, int device, void* stream) {
  const int64_t chunks = topk_chunks(rows.policy.vocab), blocks = 2 * batch * chunks;
  if (blocks > INT32_MAX) return "too many rows for one launch";
  const OnDevice current(device);
  if (current.error() != cudaSuccess) return text_of(current.error());
  TopkWorkspace work = topk_workspace(workspace, 2 * batch, rows.policy.vocab);
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  cudaError_t error = set_tickets(work.tickets, batch, device, queue);
  if (error == cudaSuccess) {
    PYARGS_LAUNCH(tokenwise_select_kernel, static_cast<unsigned>(blocks), kTopkThreads, queue, rows,
                  static_cast<uint32_t>(chunks), work);
    error = cudaGetLastError();
  }
  return text_of(error);
}

}  // namespace pyargs::cuda
