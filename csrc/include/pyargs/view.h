// An array that the caller has, as the functions of pyargs take it.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <utility>
#include <vector>

namespace pyargs {

// A dense array in row-major order, in memory that stays the caller's. A function says which type and which sizes it
// wants, whether it reads or writes, and how long the memory must be there; it throws std::runtime_error, which names
// the argument, where the type or a size is another. Any alignment that the type itself asks for will do.
struct View {
  enum Type : int {
    kOther = 0,
    kFloat32 = 1,
    kBFloat16 = 2,
    kInt64 = 4,
    kBool = 8,
    kUInt8 = 16,
    kWeight = kFloat32 | kBFloat16
  };

  View(const float* data, std::initializer_list<int64_t> sizes) : View(data, kFloat32, sizes) {}
  View(const int64_t* data, std::initializer_list<int64_t> sizes) : View(data, kInt64, sizes) {}
  View(const bool* data, std::initializer_list<int64_t> sizes) : View(data, kBool, sizes) {}
  View(const uint8_t* data, std::initializer_list<int64_t> sizes) : View(data, kUInt8, sizes) {}
  // bfloat16 has no type of its own in C++20.
  View(const void* data, Type type, std::vector<int64_t> sizes)
      : data(const_cast<void*>(data)), type(type), sizes(std::move(sizes)) {}

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  int64_t size(int i) const { return sizes[i]; }
  int64_t size() const {
    int64_t all = 1;
    for (int64_t one : sizes) all *= one;
    return all;
  }

  void* data;
  Type type;
  std::vector<int64_t> sizes;
};

}  // namespace pyargs
