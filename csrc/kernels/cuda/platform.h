// The few things in which nvcc and a host emulation of the kernels differ. A kernel uses nothing of CUDA beyond these,
// __syncthreads, __syncwarp, __shfl_down_sync, __shfl_xor_sync, __shfl_sync, __reduce_{add,min,max}_sync, atomicAdd,
// __popc, __ffs, __clz.
#pragma once

#include <cuda_runtime.h>  // CUDA's, or the one in tests/ops/emulate, which brings its own macros

#include "../common.h"

#ifndef PYARGS_LAUNCH
#define PYARGS_LAUNCH(kernel, blocks, threads, stream, ...) kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
#define PYARGS_SHARED(type, name) __shared__ type name  // all that a kernel has, once

// What lay at an address of the device's memory; `last` becomes 0, anything below it one more. Orders as release and
// acquire for all blocks: who takes a later one sees what this thread's block left before a barrier, and so does
// everybody behind a barrier of this thread's block what earlier ones left.
__device__ __forceinline__ uint32_t take_ticket(uint32_t* at, uint32_t last) {
#ifdef __CUDA_ARCH__
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(at), "r"(last) : "memory");
  return before;
#else
  return *at == last ? (*at = 0, last) : (*at)++;  // never called
#endif
}
#endif

namespace pyargs::cuda {

// 2^x without code for subnormal numbers; 2^-inf = 0, NaN stays.
__device__ __forceinline__ float fast_exp2(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

__device__ __forceinline__ float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

__device__ __forceinline__ uint32_t bits_of(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

// Two numbers of bfloat16 or float16 side by side, rounded to nearest, ties to even.
template <Dtype dtype>
__device__ __forceinline__ uint32_t rounded_pair(float low, float high) {
  static_assert(dtype != Dtype::kFloat32);
#ifdef __CUDA_ARCH__
  uint32_t pair;
  if constexpr (dtype == Dtype::kBFloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
#else
  if constexpr (dtype == Dtype::kBFloat16) return bfloat16_bits(bits_of(low)) | bfloat16_bits(bits_of(high)) << 16;
  return float16_bits(bits_of(low)) | float16_bits(bits_of(high)) << 16;
#endif
}

// A read that other blocks' writes before a ticket are seen by (past the first-level cache).
template <class T>
__device__ __forceinline__ T load_fresh(const T* address) {
#ifdef __CUDA_ARCH__
  return __ldcg(address);
#else
  return *address;
#endif
}

// A warp's product by tensor cores: sums += rows [16, 16] times columns [16, 8], of bfloat16 or float16, added up in
// float32. With g = lane / 4 and t = lane % 4 a lane has of rows g and g + 8 the elements 2 t, 2 t + 1 (words 0 and 1)
// and 2 t + 8, 2 t + 9 (words 2 and 3), of column g likewise, and of the sums columns 2 t, 2 t + 1 of row g and row
// g + 8 (mma.m16n8k16 of the PTX ISA).
template <Dtype dtype>
__device__ __forceinline__ void multiply_16_8_16(float (&sums)[4], const uint32_t (&rows)[4],
                                                 const uint32_t (&columns)[2]) {
  static_assert(dtype != Dtype::kFloat32);
#ifndef __CUDACC__
  emulate::multiply_16_8_16(sums, rows, columns, dtype == Dtype::kBFloat16);
#else
#define PYARGS_MMA(type)                                                              \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])           \
               : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(columns[0]), "r"(columns[1]))
  if constexpr (dtype == Dtype::kBFloat16) {
    PYARGS_MMA("bf16");
  } else {
    PYARGS_MMA("f16");
  }
#undef PYARGS_MMA
#endif
}

// Makes a device current while it lives, and puts the former one back.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) error_ = cudaSetDevice(device);
    changed_ = error_ == cudaSuccess && before_ != device;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  cudaError_t error() const { return error_; }

 private:
  cudaError_t error_;
  int before_ = 0;
  bool changed_ = false;
};

// Null, or the text of the error.
inline const char* text_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace pyargs::cuda
