// The code paths of a CPU: what computes is compiled once for each of them, in a namespace of that name.
#pragma once

// The capability this object is compiled for; CMake sets it for all but the baseline.
#ifndef PYARGS_CPU
#define PYARGS_CPU baseline
#endif

namespace pyargs {

// Each has all that stands before it; on Arm there are kDefault and kDotprod alone.
enum class Capability : int {
  kDefault = 0,
  kAvx2 = 1,
  kAvx512 = 2,
  kAvx512Vnni = 3,
  kAvx512Bf16 = 4,
  kDotprod = 1,
};

// The one in use, and the best that this CPU has and that was built. See capability.cpp.
Capability cpu_capability();
Capability best_capability();
const char* name_of(Capability capability);

}  // namespace pyargs

// Calls `function` of the namespace compiled for this machine. PYARGS_BEST: the best that is built, as a number; CMake
// sets it. Only csrc/stack has code of its own for kAvx512Vnni,
// kAvx512Bf16 and kDotprod.
#if PYARGS_BEST >= 2 && !defined(PYARGS_ARM)
#define PYARGS_CASE_AVX512(function, ...)    \
  case ::pyargs::Capability::kAvx512Bf16:    \
  case ::pyargs::Capability::kAvx512Vnni:    \
  case ::pyargs::Capability::kAvx512:        \
    ::pyargs::avx512::function(__VA_ARGS__); \
    break;
#else
#define PYARGS_CASE_AVX512(function, ...)
#endif
#if PYARGS_BEST >= 1 && !defined(PYARGS_ARM)
#define PYARGS_CASE_AVX2(function, ...)    \
  case ::pyargs::Capability::kAvx2:        \
    ::pyargs::avx2::function(__VA_ARGS__); \
    break;
#else
#define PYARGS_CASE_AVX2(function, ...)
#endif
#define PYARGS_DISPATCH(function, ...)             \
  do {                                             \
    switch (::pyargs::cpu_capability()) {          \
      PYARGS_CASE_AVX512(function, __VA_ARGS__)    \
      PYARGS_CASE_AVX2(function, __VA_ARGS__)      \
      default:                                     \
        ::pyargs::baseline::function(__VA_ARGS__); \
    }                                              \
  } while (0)
