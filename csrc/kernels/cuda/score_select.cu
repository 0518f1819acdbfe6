// Launch of the scoring kernel. Free of torch.
#include "launch.h"
#include "score_select.cuh"

namespace pyargs::cuda {
namespace {

template <Dtype dtype>
void launch(const ScoreRows& rows, unsigned batch, unsigned threads, cudaStream_t stream) {
  switch (rows.activation) {
    case Activation::kIdentity:
      PYARGS_LAUNCH((score_select_kernel<dtype, Activation::kIdentity>), batch, threads, stream, rows);
      break;
    case Activation::kRelu:
      PYARGS_LAUNCH((score_select_kernel<dtype, Activation::kRelu>), batch, threads, stream, rows);
      break;
    case Activation::kGelu:
      PYARGS_LAUNCH((score_select_kernel<dtype, Activation::kGelu>), batch, threads, stream, rows);
      break;
    case Activation::kLeakyRelu:
      PYARGS_LAUNCH((score_select_kernel<dtype, Activation::kLeakyRelu>), batch, threads, stream, rows);
      break;
  }
}

}  // namespace

const char* score_select(const ScoreRows& rows, int64_t batch, int device, void* stream) {
  if (batch > INT32_MAX) return "too many rows for one launch";
  if (rows.k > kMaxTopK) return "k must be at most 64 on CUDA";
  const OnDevice current(device);
  if (current.error() != cudaSuccess) return text_of(current.error());
  // A warp for each candidate; above 32 two for each, as evenly as possible.
  const unsigned threads = 32 * static_cast<unsigned>(rows.k <= 32 ? rows.k : (rows.k + 1) / 2);
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  const unsigned blocks = static_cast<unsigned>(batch);
  switch (rows.features_dtype) {
    case Dtype::kFloat32:
      launch<Dtype::kFloat32>(rows, blocks, threads, queue);
      break;
    case Dtype::kBFloat16:
      launch<Dtype::kBFloat16>(rows, blocks, threads, queue);
      break;
    case Dtype::kFloat16:
      launch<Dtype::kFloat16>(rows, blocks, threads, queue);
      break;
  }
  return text_of(cudaGetLastError());
}

}  // namespace pyargs::cuda
