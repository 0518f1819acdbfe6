// Torch's side of the ops: tensors, checks, new results, through the stable ABI (torch >= 2.10). Baseline objects only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

#include "../check.h"
#include "../kernels/common.h"

// Of the ops in torch.ops; CMake sets another one, so that two copies of the ops can be in one process.
#ifndef PYARGS_OP_NAMESPACE
#define PYARGS_OP_NAMESPACE pyargs
#endif

#ifdef PYARGS_CUDA_ARCHS
// Part of the stable C interface in builds of torch with CUDA; null elsewhere.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace pyargs {

// The Python wrapper turns a failed check into ValueError or TypeError with the fix named (pyargs/ops/*.py: check);
// the checks here are what keeps a direct call of torch.ops.pyargs.* safe.

// An argument: an owned handle with its shape at hand. torch::stable::Tensor would add a shared_ptr to each of a dozen
// arguments and a call for each number read, and a decoding step of a small model counts in microseconds. Devices are
// not compared: with tensors on several of them the dispatcher does not choose a CPU kernel.
class Array {
 public:
  explicit Array(AtenTensorHandle handle) : handle_(handle) {
    int64_t* sizes = nullptr;
    int64_t* strides = nullptr;
    check(aoti_torch_get_dim(handle, &dim_) == 0 && aoti_torch_get_sizes(handle, &sizes) == 0 &&
              aoti_torch_get_strides(handle, &strides) == 0 && aoti_torch_get_dtype(handle, &dtype_) == 0,
          "arguments must be dense tensors");
    sizes_ = sizes;
    strides_ = strides;
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  Array(Array&& other) noexcept { *this = static_cast<Array&&>(other); }
  Array& operator=(Array&& other) noexcept {
    std::swap(handle_, other.handle_);
    std::swap(dim_, other.dim_);
    std::swap(sizes_, other.sizes_);
    std::swap(strides_, other.strides_);
    std::swap(dtype_, other.dtype_);
    return *this;
  }
  ~Array() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  int64_t dim() const { return dim_; }
  int64_t size(int64_t i) const { return sizes_[i]; }
  int64_t stride(int64_t i) const { return strides_[i]; }
  int32_t dtype() const { return dtype_; }

  int32_t device_type() const {
    int32_t type = 0;
    aoti_torch_get_device_type(handle_, &type);
    return type;
  }
  int32_t device_index() const {
    int32_t index = 0;
    aoti_torch_get_device_index(handle_, &index);
    return index;
  }

  template <class T = void>
  T* data() const {
    void* data = nullptr;
    check(aoti_torch_get_data_ptr(handle_, &data) == 0, "a tensor has no data");
    return static_cast<T*>(data);
  }

  Dtype float_dtype(const char* message) const {
    if (dtype_ == aoti_torch_dtype_float32()) return Dtype::kFloat32;
    if (dtype_ == aoti_torch_dtype_bfloat16()) return Dtype::kBFloat16;
    check(dtype_ == aoti_torch_dtype_float16(), message);
    return Dtype::kFloat16;
  }

  // A tensor of this shape and dtype, and dense: if it is not, this becomes a dense copy.
  void require(std::initializer_list<int64_t> shape, int32_t dtype, const char* message) {
    bool ok = dtype_ == dtype && dim_ == static_cast<int64_t>(shape.size());
    bool dense = true;
    int64_t expected = 1;
    for (int64_t i = dim_ - 1; ok && i >= 0; --i) {
      const int64_t wanted = shape.begin()[i];
      ok = sizes_[i] == wanted;
      dense = dense && (wanted <= 1 || strides_[i] == expected);
      expected *= wanted;
    }
    check(ok, message);
    if (!dense) make_contiguous();
  }

  // As `require`, for rows that may lie apart; returns how far.
  int64_t require_rows(std::initializer_list<int64_t> shape, int32_t dtype, const char* message) {
    const bool apart = dim_ == 2 && sizes_[0] > 1 && (sizes_[1] == 1 || strides_[1] == 1) && strides_[0] >= sizes_[1];
    if (!apart) {
      require(shape, dtype, message);
      return shape.begin()[1];
    }
    check(dtype_ == dtype && shape.size() == 2 && sizes_[0] == shape.begin()[0] && sizes_[1] == shape.begin()[1],
          message);
    return strides_[0];
  }

  // A dense tensor of this shape and dtype, to be written to.
  void require_in_place(std::initializer_list<int64_t> shape, int32_t dtype, const char* message) {
    const AtenTensorHandle before = handle_;
    require(shape, dtype, message);
    check(handle_ == before, "a tensor that is written to must be dense");
  }

  // Elements of the last dimension side by side (the kernels take any stride of the others): else a dense copy.
  void require_dense_rows() {
    if (sizes_[dim_ - 1] > 1 && strides_[dim_ - 1] != 1) make_contiguous();
  }

  void make_contiguous() {
    AtenTensorHandle copy = nullptr;
    check(aoti_torch_new_tensor_handle(handle_, &copy) == 0, "no memory");
    const torch::stable::Tensor dense = torch::stable::contiguous(torch::stable::Tensor(copy));
    check(aoti_torch_new_tensor_handle(dense.get(), &copy) == 0, "no memory");
    *this = Array(copy);
  }

 private:
  AtenTensorHandle handle_ = nullptr;
  int64_t dim_ = 0;
  const int64_t *sizes_ = nullptr, *strides_ = nullptr;
  int32_t dtype_ = 0;
};

#ifdef PYARGS_CUDA_ARCHS
// The stream on which torch queues work of the array's device now.
inline void* cuda_stream(const Array& array) {
  check(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(array.device_index(), &stream) == 0, "no CUDA stream");
  return stream;
}

// A launch returns null or the text of an error.
inline void check_launch(const char* error) { check(error == nullptr, error ? error : ""); }

// One argument on CUDA is enough for the dispatcher to choose the CUDA kernel. Arrays that are not given are null.
inline void check_one_device(std::initializer_list<const Array*> arrays) {
  const Array& first = **arrays.begin();
  for (const Array* array : arrays) {
    check(!array || (array->device_type() == first.device_type() && array->device_index() == first.device_index()),
          "all tensors must be on one device");
  }
}
#endif

// A new dense tensor, uninitialised, that a kernel returns.
class Result {
 public:
  Result(std::initializer_list<int64_t> shape, int32_t dtype, const Array& like) {
    int64_t strides[4];
    int64_t stride = 1;
    for (size_t i = shape.size(); i-- > 0;) {
      strides[i] = stride;
      stride *= shape.begin()[i] > 0 ? shape.begin()[i] : 1;
    }
    check(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.begin(), strides, dtype,
                                   like.device_type(), like.device_index(), &handle_) == 0,
          "no memory for the result");
  }
  Result(const Result&) = delete;
  Result& operator=(const Result&) = delete;
  ~Result() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  template <class T = void>
  T* data() const {
    void* data = nullptr;
    check(aoti_torch_get_data_ptr(handle_, &data) == 0, "a tensor has no data");
    return static_cast<T*>(data);
  }

  // Gives the handle away as what a boxed kernel returns.
  StableIValue release() {
    const auto value = reinterpret_cast<StableIValue>(handle_);
    handle_ = nullptr;
    return value;
  }

 private:
  AtenTensorHandle handle_ = nullptr;
};

inline const Array* given(const std::optional<Array>& array) { return array ? &*array : nullptr; }

// An optional argument of an op.
inline std::optional<Array> array_or_none(std::optional<AtenTensorHandle> handle) {
  if (!handle) return std::nullopt;
  return Array(*handle);
}

}  // namespace pyargs
