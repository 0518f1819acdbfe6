// What a thread of the top-k kernels does with its 32 elements of a chunk, which stay in registers: the largest, the
// sum of the exponentials, and a bit for each that reaches a bound. Two elements of 16 bits share a register, and most
// instructions.
#pragma once

#include "elements.cuh"

namespace pyargs::cuda {

constexpr int kTopkThreads = 256, kTopkPerThread = 32, kTopkChunk = kTopkThreads * kTopkPerThread;
constexpr float kTopkLog2E = 1.44269504f;
constexpr float kTopkLarge = 1 << 20;

// Bits of the float32 of one half of a word, or of the word.
template <Dtype dtype>
__device__ __forceinline__ uint32_t element_bits(uint32_t word, int half) {
  if (dtype == Dtype::kFloat32) return word;
  if (dtype == Dtype::kBFloat16) return half == 0 ? word << 16 : word & 0xffff0000u;
  return half_bits(dtype, (word >> (16 * half)) & 0xffffu);
}

// The larger of two float32, or of two halves on either side; NaN where one of the two is.
template <Dtype dtype>
__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint32_t found;
  if constexpr (dtype == Dtype::kFloat32) {
    float value;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(value) : "f"(float_of(a)), "f"(float_of(b)));
    found = bits_of(value);
  } else if constexpr (dtype == Dtype::kBFloat16) {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(found) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(found) : "r"(a), "r"(b));
  }
  return found;
#else
  uint32_t found = 0;
  for (int half = 0; half < (dtype == Dtype::kFloat32 ? 1 : 2); ++half) {
    const float x = float_of(element_bits<dtype>(a, half)), y = float_of(element_bits<dtype>(b, half));
    const uint32_t mask = dtype == Dtype::kFloat32 ? 0xffffffffu : 0xffffu << (16 * half);
    found |= (x != x || x >= y ? a : b) & mask;
  }
  return found;
#endif
}

// Twice the 16-bit element of which this is the value.
template <Dtype dtype>
__device__ __forceinline__ uint32_t twice(float value) {
  if constexpr (dtype == Dtype::kBFloat16) return (bits_of(value) & 0xffff0000u) | bits_of(value) >> 16;
#ifdef __CUDA_ARCH__
  uint32_t found;
  asm("cvt.rn.f16x2.f32 %0, %1, %1;" : "=r"(found) : "f"(value));
  return found;
#else
  const uint32_t magnitude = bits_of(value) & 0x7fffffffu;
  uint32_t half = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  if (magnitude < 0x7f800000u) {
    half = magnitude < (113u << 23) ? static_cast<uint32_t>(float_of(magnitude) * 16777216.0f)
                                    : (magnitude - (112u << 23)) >> 13;
  }
  return (half | (bits_of(value) >> 16 & 0x8000u)) * 0x10001u;
#endif
}

// All bits of a half whose element is not below that of `bound`, which NaN is not, nor anything below NaN.
template <Dtype dtype>
__device__ __forceinline__ uint32_t halves_reaching(uint32_t word, uint32_t bound) {
#ifdef __CUDA_ARCH__
  uint32_t found;
  if constexpr (dtype == Dtype::kFloat16) {
    asm("set.geu.u32.f16x2 %0, %1, %2;" : "=r"(found) : "r"(word), "r"(bound));
    return found;
  }
#if __CUDA_ARCH__ >= 900
  asm("set.geu.u32.bf16x2 %0, %1, %2;" : "=r"(found) : "r"(word), "r"(bound));
  return found;
#endif
#endif
  const float least = float_of(element_bits<dtype>(bound, 0));
  return (float_of(element_bits<dtype>(word, 0)) < least ? 0 : 0xffffu) |
         (float_of(element_bits<dtype>(word, 1)) < least ? 0 : 0xffff0000u);
}

template <Dtype dtype>
struct TopkElements {
  static constexpr int kSize = dtype == Dtype::kFloat32 ? 4 : 2;
  static constexpr int kWords = kTopkPerThread * kSize / 4, kPerWord = 4 / kSize;
  static constexpr int kVector = 16 / kSize;  // elements of a 16-byte load
  static constexpr uint32_t kMinusInf = dtype == Dtype::kFloat32    ? 0xff800000u
                                        : dtype == Dtype::kBFloat16 ? 0xff80ff80u
                                                                    : 0xfc00fc00u;

  uint32_t words[kWords];

  // Elements beyond n become -inf. A row that does not start at 16 bytes, and the end of a row, are read one by one,
  // into the same registers: the sums do not depend on where a row lies.
  __device__ __forceinline__ TopkElements(const char* chunk, int n) {
    const bool aligned = reinterpret_cast<uintptr_t>(chunk) % 16 == 0;
    if (aligned && n == kTopkChunk) {
      read_whole(chunk);
    } else {
#pragma unroll
      for (int load = 0; load < kWords / 4; ++load) read_part(chunk, aligned, n, load);
    }
  }

  __device__ __forceinline__ void read_whole(const char* chunk) {
#pragma unroll
    for (int load = 0; load < kWords / 4; ++load) set(load, reinterpret_cast<const uint4*>(chunk)[vector(load)]);
  }

  __device__ __forceinline__ void read_part(const char* chunk, bool aligned, int n, int load) {
    const int at = vector(load) * kVector;
    if (aligned && at + kVector <= n) {
      set(load, reinterpret_cast<const uint4*>(chunk)[vector(load)]);
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) words[4 * load + i] = kMinusInf;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (at + i >= n) continue;
      uint32_t& word = words[4 * load + i / kPerWord];
      if constexpr (dtype == Dtype::kFloat32) {
        word = reinterpret_cast<const uint32_t*>(chunk)[at + i];
      } else {
        const uint32_t half = reinterpret_cast<const uint16_t*>(chunk)[at + i];
        word = i % 2 == 0 ? (word & 0xffff0000u) | half : (word & 0xffffu) | half << 16;
      }
    }
  }

  static __device__ __forceinline__ int vector(int load) { return load * kTopkThreads + static_cast<int>(threadIdx.x); }

  __device__ __forceinline__ void set(int load, uint4 vector) {
    words[4 * load] = vector.x, words[4 * load + 1] = vector.y;
    words[4 * load + 2] = vector.z, words[4 * load + 3] = vector.w;
  }

  __device__ __forceinline__ float value(int i) const {
    return float_of(element_bits<dtype>(words[i / kPerWord], i % kPerWord));
  }

  // The largest; NaN if one is.
  __device__ __forceinline__ float largest() const {
    uint32_t found[4];
#pragma unroll
    for (int i = 0; i < kWords; ++i) found[i % 4] = i < 4 ? words[i] : larger<dtype>(found[i % 4], words[i]);
    const uint32_t word = larger<dtype>(larger<dtype>(found[0], found[1]), larger<dtype>(found[2], found[3]));
    if (dtype == Dtype::kFloat32) return float_of(word);
    return float_of(larger<Dtype::kFloat32>(element_bits<dtype>(word, 0), element_bits<dtype>(word, 1)));
  }

  // The sum of 2^((x - base) log2 e), where no element is above base. NaN if one is, or +inf.
  __device__ __forceinline__ float sum(float base) const {
    float sum = 0.0f;
    if (fabsf(base) < kTopkLarge) {
      // One multiply-add for each; `off`, by which base log2 e was rounded, is in all of them.
      const float scaled = base * kTopkLog2E, off = fmaf(base, kTopkLog2E, -scaled);
#pragma unroll
      for (int i = 0; i < kTopkPerThread; ++i) sum += fast_exp2(fmaf(value(i), kTopkLog2E, -scaled));
      return sum * fast_exp2(-off);
    }
    if (base == -INFINITY) return sum;
#pragma unroll
    for (int i = 0; i < kTopkPerThread; ++i) sum += fast_exp2((value(i) - base) * kTopkLog2E);  // +inf - +inf is NaN
    return sum;
  }

  // A bit for each element that is not below `bound`, which is an element, -inf or NaN. place() says where it is.
  __device__ __forceinline__ uint32_t reaching(float bound) const {
    uint32_t found = 0;
    if constexpr (dtype == Dtype::kFloat32) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) found |= float_of(words[i]) < bound ? 0 : 1u << i;
    } else {
      const uint32_t both = twice<dtype>(bound);
#pragma unroll
      for (int i = 0; i < kWords; ++i) found |= halves_reaching<dtype>(words[i], both) & (0x10001u << i);
    }
    return found;
  }

  // Place in the chunk of the element of the lowest bit.
  static __device__ __forceinline__ int place(uint32_t bits) {
    const uint32_t bit = static_cast<uint32_t>(__ffs(static_cast<int>(bits)) - 1), word = bit % kWords;
    return vector(static_cast<int>(word / 4)) * kVector + static_cast<int>(word % 4 * kPerWord + bit / kWords);
  }
};

// Key of element i of a chunk, from memory. `first` is the id of element 0.
template <Dtype dtype>
struct ChunkKey {
  const char* chunk;
  uint32_t first;
  __device__ __forceinline__ uint64_t operator()(int64_t i) const {
    const uint32_t word = dtype == Dtype::kFloat32 ? reinterpret_cast<const uint32_t*>(chunk)[i]
                                                   : reinterpret_cast<const uint16_t*>(chunk)[i];
    return topk_key(element_bits<dtype>(word, 0), first + static_cast<uint32_t>(i));
  }
};

}  // namespace pyargs::cuda
