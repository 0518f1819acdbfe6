// Launch of user_mlp and score_select at once. Free of torch.
#include "launch.h"
#include "tickets.h"
#include "user_mlp_select.cuh"

namespace pyargs::cuda {

size_t user_mlp_select_workspace_bytes(const UserMlpRows& mlp, int64_t batch) {
  return static_cast<size_t>(batch * (mlp_unit_blocks(mlp) * mlp.k * sizeof(float) + sizeof(uint32_t)));
}

const char* user_mlp_select(const ScoreRows& rows, const UserMlpRows& mlp, int64_t batch, void* workspace, int device,
                            void* stream) {
  const int64_t unit_blocks = mlp_unit_blocks(mlp), groups = mlp_groups(mlp);
  if (batch * unit_blocks * groups > INT32_MAX) return "too many rows for one launch";
  if (rows.k > kMaxTopK) return "k must be at most 64 on CUDA";
  const OnDevice current(device);
  if (current.error() != cudaSuccess) return text_of(current.error());
  const unsigned blocks = static_cast<unsigned>(batch * unit_blocks * groups);
  const int unit_blocks_32 = static_cast<int>(unit_blocks), groups_32 = static_cast<int>(groups);
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  MlpSelectWorkspace work;
  work.tickets = static_cast<uint32_t*>(workspace);
  work.parts = reinterpret_cast<float*>(work.tickets + batch);
  const cudaError_t error = set_tickets(work.tickets, batch, device, queue);
  if (error != cudaSuccess) return text_of(error);
  switch (mlp.bank_dtype) {
    case Dtype::kFloat32:
      PYARGS_LAUNCH(user_mlp_select_kernel<Dtype::kFloat32>, blocks, kMlpThreads, queue, rows, mlp, unit_blocks_32,
                    groups_32, work);
      break;
    case Dtype::kBFloat16:
      PYARGS_LAUNCH(user_mlp_select_kernel<Dtype::kBFloat16>, blocks, kMlpThreads, queue, rows, mlp, unit_blocks_32,
                    groups_32, work);
      break;
    case Dtype::kFloat16:
      PYARGS_LAUNCH(user_mlp_select_kernel<Dtype::kFloat16>, blocks, kMlpThreads, queue, rows, mlp, unit_blocks_32,
                    groups_32, work);
      break;
  }
  return text_of(cudaGetLastError());
}

}  // namespace pyargs::cuda
