// Launch of the attention of branches. Free of torch.
#include "branch_attention.cuh"
#include "launch.h"
#include "tickets.h"

namespace pyargs::cuda {
namespace {

template <Dtype dtype>
void launch(const BranchRows& rows, const BranchWorkspace& work, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(branch_units(rows)), static_cast<unsigned>(branch_parts(rows)));
  if (rows.dim <= kBranchWidth) {
    PYARGS_LAUNCH((branch_attention_kernel<dtype, 1>), blocks, kBranchThreads, stream, rows, work);
  } else if (rows.dim <= 2 * kBranchWidth) {
    PYARGS_LAUNCH((branch_attention_kernel<dtype, 2>), blocks, kBranchThreads, stream, rows, work);
  } else if constexpr (dtype == Dtype::kBFloat16) {  // the others would need more registers than there are
    PYARGS_LAUNCH((branch_attention_kernel<dtype, 4>), blocks, kBranchThreads, stream, rows, work);
  }
}

}  // namespace

size_t branch_workspace_bytes(const BranchRows& rows) {
  const BranchWorkspace work = branch_workspace(nullptr, rows);
  return reinterpret_cast<uintptr_t>(work.tickets + branch_units(rows));
}

const char* branch_attention(const BranchRows& rows, void* workspace, int device, void* stream) {
  const int64_t units = branch_units(rows);
  if (units > INT32_MAX) return "too many rows for one launch";
  if (rows.dtype != Dtype::kBFloat16 && rows.dim > 2 * kBranchWidth) {
    return "heads of float32 and float16 must have at most 128 elements on CUDA";
  }
  const OnDevice current(device);
  if (current.error() != cudaSuccess) return text_of(current.error());
  BranchWorkspace work = branch_workspace(workspace, rows);
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaSuccess;
  if (branch_parts(rows) > 1) error = set_tickets(work.tickets, units, device, queue);
  if (error == cudaSuccess) {
    switch (rows.dtype) {
      case Dtype::kFloat32:
        launch<Dtype::kFloat32>(rows, work, queue);
        break;
      case Dtype::kBFloat16:
        launch<Dtype::kBFloat16>(rows, work, queue);
        break;
      case Dtype::kFloat16:
        launch<Dtype::kFloat16>(rows, work, queue);
        break;
    }
    error = cudaGetLastError();
  }
  return text_of(error);
}

}  // namespace pyargs::cuda
