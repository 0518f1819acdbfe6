// A tensor that Python hands over, through DLPack, as a view. Baseline only; Python's lock must be held where a tensor
// is made or destroyed.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>

#include "../include/pyargs/view.h"

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

inline pybind11::handle to_dlpack;  // of torch; `bind` sets it

inline View::Type type_of(const DlTensor& tensor) {
  if (tensor.lanes != 1) return View::kOther;
  switch (tensor.code << 8 | tensor.bits) {
    case 2 << 8 | 32:
      return View::kFloat32;
    case 4 << 8 | 16:
      return View::kBFloat16;
    case 0 << 8 | 64:
      return View::kInt64;
    case 1 << 8 | 8:
      return View::kUInt8;
    case 6 << 8 | 8:
      return View::kBool;
    default:
      return View::kOther;
  }
}

inline bool dense(const DlTensor& tensor) {
  const int64_t* end = tensor.shape + tensor.dimensions;
  if (std::find(tensor.shape, end, 0) != end) return true;
  int64_t expected = 1;
  for (int32_t i = tensor.dimensions - 1; i >= 0; --i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != expected) return false;
    expected *= tensor.shape[i];
  }
  return true;
}

// A dense tensor on the CPU; its memory lives as long as this does. An error names the argument.
struct Tensor : View {
  Tensor(const char* name, pybind11::handle tensor) : View(nullptr, kOther, {}) {
    capsule = pybind11::reinterpret_steal<pybind11::object>(PyObject_CallOneArg(to_dlpack.ptr(), tensor.ptr()));
    const std::string wanted = std::string("pyargs: ") + name + " must be a dense tensor on the CPU";
    if (!capsule) {
      pybind11::error_already_set error;
      throw std::runtime_error(wanted + ": " + std::string(pybind11::str(error.value())));
    }
    const auto& given = *static_cast<const DlTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    if (given.device_type != kDlCpu || !dense(given)) {
      throw std::runtime_error(wanted + "; got " +
                               std::string(pybind11::str("{0.dtype} {1}, strides {2}, on {0.device}")
                                               .format(tensor, pybind11::list(tensor.attr("shape")),
                                                       pybind11::list(tensor.attr("stride")()))));
    }
    data = static_cast<char*>(given.data) + given.byte_offset;
    type = type_of(given);
    sizes.assign(given.shape, given.shape + given.dimensions);
  }

  pybind11::object capsule;
};

inline std::optional<Tensor> optional_tensor(const char* name, pybind11::handle tensor) {
  return tensor.is_none() ? std::nullopt : std::make_optional<Tensor>(name, tensor);
}

}  // namespace pyargs::stack
