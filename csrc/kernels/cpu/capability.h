// The code paths of a CPU: what computes is compiled once for each of them, in a namespace of that name.
#pragma once

// The capability this object is compiled for; CMake sets it for all but the baseline.
#ifndef PYARGS_CPU
#define PYARGS_CPU baseline
#endif

namespace pyargs {

// kAvx512Vnni runs the code of kAvx512, and csrc/stack multiplies int8 with vpdpbusd.
enum class Capability : int { kDefault = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Vnni = 3, kAvx512Bf16 = 4 };

// The one in use: the best of this CPU, or what PYARGS_CPU_CAPABILITY=default|avx2|avx512|avx512_vnni|avx512_bf16 says.
// See module.cpp.
Capability cpu_capability();

}  // namespace pyargs

// Calls `function` of the namespace compiled for this machine. Only csrc/stack has code of its own for kAvx512Bf16.
#ifdef PYARGS_X86
#define PYARGS_DISPATCH(function, ...)             \
  do {                                             \
    switch (::pyargs::cpu_capability()) {          \
      case ::pyargs::Capability::kAvx512Bf16:      \
      case ::pyargs::Capability::kAvx512Vnni:      \
      case ::pyargs::Capability::kAvx512:          \
        ::pyargs::avx512::function(__VA_ARGS__);   \
        break;                                     \
      case ::pyargs::Capability::kAvx2:            \
        ::pyargs::avx2::function(__VA_ARGS__);     \
        break;                                     \
      default:                                     \
        ::pyargs::baseline::function(__VA_ARGS__); \
    }                                              \
  } while (0)
#else
#define PYARGS_DISPATCH(function, ...) ::pyargs::baseline::function(__VA_ARGS__)
#endif
