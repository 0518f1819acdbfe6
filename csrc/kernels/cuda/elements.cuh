// Elements of float32, bfloat16 and float16 tensors as float32, one by one or 8 to a lane.
#pragma once

#include "platform.h"

namespace pyargs::cuda {

constexpr int kLaneElements = 8;
constexpr int kWarpElements = 32 * kLaneElements;

// Where shared memory holds element i, of which lane i / 8 reads 8 in a row: element e of all lanes side by side, in
// rows of 36 floats, so that neither those who read (one e at a time) nor those who write (in order of i) meet in a
// bank.
constexpr int kLanePitch = 36, kStepFloats = kLaneElements * kLanePitch;

__device__ __forceinline__ int place(int i) {
  return i / kWarpElements * kStepFloats + i % kLaneElements * kLanePitch + i % kWarpElements / kLaneElements;
}

// Bits of the float32 with the value of a bfloat16 or float16.
__device__ __forceinline__ uint32_t half_bits(Dtype dtype, uint32_t half) {
  if (dtype == Dtype::kBFloat16) return half << 16;
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<unsigned short>(half)));
  return bits_of(value);
#else
  return float16_to_float32_bits(half);
#endif
}

__device__ __forceinline__ float element(Dtype dtype, const void* source, int64_t at) {
  if (dtype == Dtype::kFloat32) return static_cast<const float*>(source)[at];
  return float_of(half_bits(dtype, static_cast<const uint16_t*>(source)[at]));
}

// Elements at .. at + 8 of which the first n count; the others are not read and stay 0. With 16-byte loads where the
// address allows it: the values are the same either way.
template <Dtype dtype>
__device__ __forceinline__ void load_elements(const void* source, int64_t at, int n, float* out) {
  constexpr int kSize = dtype == Dtype::kFloat32 ? 4 : 2;
  const char* address = static_cast<const char*>(source) + at * kSize;
  if (n >= kLaneElements && reinterpret_cast<uintptr_t>(address) % 16 == 0) {
    const uint4* vectors = reinterpret_cast<const uint4*>(address);
    if (dtype == Dtype::kFloat32) {
      const uint4 a = vectors[0], b = vectors[1];
      const uint32_t words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = float_of(words[i]);
    } else {
      const uint4 a = vectors[0];
      const uint32_t words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = float_of(half_bits(dtype, (words[i / 2] >> (16 * (i % 2))) & 0xffffu));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) out[i] = i < n ? element(dtype, source, at + i) : 0.0f;
}

}  // namespace pyargs::cuda
