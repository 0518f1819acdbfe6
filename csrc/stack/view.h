// A tensor that Python hands over, through DLPack: what it is is checked here, and a message names the argument.
// Baseline only; Python's lock must be held where a view is made or destroyed.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "../kernels/common.h"

namespace pyargs::stack {

// What a capsule "dltensor" holds first, by the DLPack specification. (torch's own header is closed to the stable ABI.)
struct DlTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dimensions;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t *shape, *strides;
  uint64_t byte_offset;
};
constexpr int32_t kDlCpu = 1;

// A dense tensor on the CPU, which lives as long as the view does.
class View {
 public:
  enum Kind : int { kFloat32 = 1, kBFloat16 = 2, kInt64 = 4, kBool = 8, kWeight = kFloat32 | kBFloat16 };

  // shape: -1 fits any size.
  View(const char* name, pybind11::handle tensor, Kind kind, std::initializer_list<int64_t> shape) {
    capsule_ = pybind11::reinterpret_steal<pybind11::object>(PyObject_CallOneArg(to_dlpack.ptr(), tensor.ptr()));
    if (!capsule_) {
      pybind11::error_already_set error;
      fail(name, "must be a dense tensor on the CPU: " + std::string(pybind11::str(error.value())));
    }
    tensor_ = static_cast<const DlTensor*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"));
    const int32_t dimensions = tensor_->dimensions;
    bool fits =
        (kind & this->kind()) && tensor_->device_type == kDlCpu && dimensions == static_cast<int32_t>(shape.size());
    for (int32_t i = 0; fits && i < dimensions; ++i) {
      const int64_t wanted = shape.begin()[i];
      fits = wanted < 0 || size(i) == wanted;
      size_ *= size(i);
    }
    int64_t dense = 1;
    for (int32_t i = dimensions - 1; fits && size_ > 0 && i >= 0; --i) {
      fits = size(i) == 1 || tensor_->strides[i] == dense;
      dense *= size(i);
    }
    if (fits) [[likely]]
      return;
    std::string wanted;
    for (int64_t one : shape) wanted += (wanted.empty() ? "" : ", ") + (one < 0 ? "any" : std::to_string(one));
    fail(name, std::string("must be ") + names(kind) + " [" + wanted + "], dense, on the CPU; got " +
                   std::string(pybind11::str("{0.dtype} {1}, strides {2}, on {0.device}")
                                   .format(tensor, pybind11::list(tensor.attr("shape")),
                                           pybind11::list(tensor.attr("stride")()))));
  }

  template <class T = void>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(tensor_->data) + tensor_->byte_offset);
  }
  int64_t size(int i) const { return tensor_->shape[i]; }
  int64_t size() const { return size_; }
  Dtype dtype() const { return kind() == kBFloat16 ? Dtype::kBFloat16 : Dtype::kFloat32; }

  static inline pybind11::handle to_dlpack;  // of torch; `bind` sets it

 private:
  int kind() const {
    if (tensor_->lanes != 1) return 0;
    switch (tensor_->code << 8 | tensor_->bits) {
      case 2 << 8 | 32:
        return kFloat32;
      case 4 << 8 | 16:
        return kBFloat16;
      case 0 << 8 | 64:
        return kInt64;
      case 6 << 8 | 8:
        return kBool;
      default:
        return 0;
    }
  }

  static const char* names(Kind kind) {
    return kind == kInt64 ? "int64" : kind == kBool ? "bool" : kind == kFloat32 ? "float32" : "float32 or bfloat16";
  }

  [[noreturn]] static void fail(const char* name, const std::string& message) {
    throw std::runtime_error(std::string("pyargs: ") + name + " " + message);
  }

  pybind11::object capsule_;
  const DlTensor* tensor_ = nullptr;
  int64_t size_ = 1;
};

}  // namespace pyargs::stack
