// Torch's side of the ops: checks and new tensors, through the stable ABI (torch >= 2.10). Baseline objects only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <stdexcept>
#include <string>

#include "common.h"

namespace pyargs {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The Python wrapper turns a failed check into ValueError or TypeError with the fix named (pyargs/ops/*.py: check);
// these are what keeps a direct call of torch.ops.pyargs.* safe.
inline void check(bool ok, const char* message) {
  if (!ok) [[unlikely]]
    throw std::runtime_error(std::string("pyargs: ") + message);
}

inline Dtype float_dtype(const Tensor& tensor, const char* message) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      throw std::runtime_error(std::string("pyargs: ") + message);
  }
}

// The dispatcher picks a kernel by any of the arguments: all must live where the kernel runs.
inline void check_device(const Tensor& tensor, const Tensor& like) {
  int32_t type = 0, expected = 0;
  aoti_torch_get_device_type(tensor.get(), &type);
  aoti_torch_get_device_type(like.get(), &expected);
  check(type == expected && tensor.get_device_index() == like.get_device_index(), "tensors on different devices");
}

// A vector [n] of one dtype.
inline void check_vector(const Tensor& tensor, int64_t n, ScalarType type, const Tensor& like, const char* message) {
  check(tensor.dim() == 1 && tensor.size(0) == n && tensor.scalar_type() == type, message);
  check_device(tensor, like);
}

// The tensor itself if elements of a row lie side by side (the kernels take any stride between rows), else a copy.
inline Tensor with_dense_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.size(last) <= 1 || tensor.stride(last) == 1) return tensor;
  return torch::stable::contiguous(tensor);
}

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

template <size_t N>
Tensor new_tensor(const std::array<int64_t, N>& sizes, int32_t dtype, const Tensor& like) {
  int64_t strides[N];
  int64_t stride = 1;
  for (size_t i = N; i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  int32_t type = 0;
  aoti_torch_get_device_type(like.get(), &type);
  AtenTensorHandle handle = nullptr;
  check(aoti_torch_empty_strided(N, sizes.data(), strides, dtype, type, like.get_device_index(), &handle) == 0,
        "no memory for the result");
  return Tensor(handle);
}

}  // namespace pyargs
