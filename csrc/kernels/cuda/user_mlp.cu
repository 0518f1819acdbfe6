// Launch of the per-user MLP's first layer. Free of torch.
#include "launch.h"
#include "user_mlp.cuh"

namespace pyargs::cuda {

const char* user_mlp(const UserMlpRows& rows, int64_t batch, int device, void* stream) {
  const int64_t unit_blocks = mlp_unit_blocks(rows), groups = mlp_groups(rows);
  if (batch * unit_blocks * groups > INT32_MAX) return "too many rows for one launch";
  const OnDevice current(device);
  if (current.error() != cudaSuccess) return text_of(current.error());
  const unsigned blocks = static_cast<unsigned>(batch * unit_blocks * groups);
  const int unit_blocks_32 = static_cast<int>(unit_blocks), groups_32 = static_cast<int>(groups);
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  switch (rows.bank_dtype) {
    case Dtype::kFloat32:
      PYARGS_LAUNCH(user_mlp_kernel<Dtype::kFloat32>, blocks, kMlpThreads, queue, rows, unit_blocks_32, groups_32);
      break;
    case Dtype::kBFloat16:
      PYARGS_LAUNCH(user_mlp_kernel<Dtype::kBFloat16>, blocks, kMlpThreads, queue, rows, unit_blocks_32, groups_32);
      break;
    case Dtype::kFloat16:
      PYARGS_LAUNCH(user_mlp_kernel<Dtype::kFloat16>, blocks, kMlpThreads, queue, rows, unit_blocks_32, groups_32);
      break;
  }
  return text_of(cudaGetLastError());
}

}  // namespace pyargs::cuda
