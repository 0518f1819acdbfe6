// Elements of float32, bfloat16 and float16 tensors as float32, one by one or 8 to a lane.
#pragma once

#include "platform.h"

namespace pyargs::cuda {

constexpr int kLaneElements = 8;
constexpr int kWarpElements = 32 * kLaneElements;

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

// 8 elements in a row as they lie in memory.
template <Dtype dtype>
struct Elements {
  static constexpr int kSize = dtype == Dtype::kFloat32 ? 4 : 2;
  static constexpr int kVectors = kLaneElements * kSize / 16;  // 16-byte loads
  uint32_t words[4 * kVectors];

  __device__ __forceinline__ uint32_t bits(int i) const {
    return dtype == Dtype::kFloat32 ? words[i] : (words[i / 2] >> (16 * (i % 2))) & 0xffffu;
  }
  __device__ __forceinline__ float operator[](int i) const {
    return float_of(dtype == Dtype::kFloat32 ? bits(i) : half_bits(dtype, bits(i)));
  }
};

// Elements at .. at + 8, which start at a multiple of 16 bytes; zeros if they are not there.
template <Dtype dtype>
__device__ __forceinline__ Elements<dtype> load_aligned(const void* source, int64_t at, bool there) {
  const char* address = static_cast<const char*>(source) + at * Elements<dtype>::kSize;
  Elements<dtype> found;
#pragma unroll
  for (int i = 0; i < Elements<dtype>::kVectors; ++i) {
    const uint4 vector = there ? reinterpret_cast<const uint4*>(address)[i] : make_uint4(0, 0, 0, 0);
    found.words[4 * i] = vector.x, found.words[4 * i + 1] = vector.y;
    found.words[4 * i + 2] = vector.z, found.words[4 * i + 3] = vector.w;
  }
  return found;
}

// Elements at .. at + 8 of which the first n count; the others are not read and are 0. With 16-byte loads where the
// address allows it: the values are the same either way.
template <Dtype dtype>
__device__ __forceinline__ Elements<dtype> load_elements(const void* source, int64_t at, int64_t n) {
  constexpr int kSize = Elements<dtype>::kSize;
  const char* address = static_cast<const char*>(source) + at * kSize;
  Elements<dtype> found;
  if (n >= kLaneElements && reinterpret_cast<uintptr_t>(address) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < Elements<dtype>::kVectors; ++i) {
      const uint4 vector = reinterpret_cast<const uint4*>(address)[i];
      const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) found.words[4 * i + j] = words[j];
    }
    return found;
  }
#pragma unroll
  for (int i = 0; i < 4 * Elements<dtype>::kVectors; ++i) {
    if (kSize == 4) {
      found.words[i] = i < n ? reinterpret_cast<const uint32_t*>(address)[i] : 0;
    } else {
      const uint16_t* halves = reinterpret_cast<const uint16_t*>(address) + 2 * i;
      const uint32_t low = 2 * i < n ? halves[0] : 0, high = 2 * i + 1 < n ? halves[1] : 0;
      found.words[i] = low | high << 16;
    }
  }
  return found;
}

// Into shared memory as float32, for a warp of which lane l reads elements 8 l .. 8 l + 8 one by one: element e of all
// lanes side by side, so that neither those who read nor those who write meet in a bank.
__device__ __forceinline__ void to_lane(float* step, int lane, Dtype dtype, const void* source, int64_t at, int64_t n) {
  float x[kLaneElements];
  if (dtype == Dtype::kFloat32) {
    const auto found = load_elements<Dtype::kFloat32>(source, at, n);
#pragma unroll
    for (int e = 0; e < kLaneElements; ++e) x[e] = found[e];
  } else {
    const auto found = load_elements<Dtype::kBFloat16>(source, at, n);  // either half: they are as long
#pragma unroll
    for (int e = 0; e < kLaneElements; ++e) {
      x[e] = float_of(half_bits(dtype, (found.words[e / 2] >> (16 * (e % 2))) & 0xffffu));
    }
  }
#pragma unroll
  for (int e = 0; e < kLaneElements; ++e) step[32 * e + lane] = x[e];
}

}  // namespace pyargs::cuda
