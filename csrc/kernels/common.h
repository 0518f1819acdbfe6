// What all kernels share: number formats, and the keys that values and ids are sorted by. No header of torch below
// csrc/kernels: the files are compiled for AVX2, AVX-512 and by nvcc.
#pragma once

#include <cstdint>
#include <cstring>

#include "../include/pyargs/kernels.h"

#ifdef __CUDACC__
#define PYARGS_HD __host__ __device__ __forceinline__
#else
#define PYARGS_HD inline
#endif

namespace pyargs {

// An unsigned key that sorts as torch.topk does, ties decided: NaN above +inf, then the value, then the lower index.
// Keys are unique and never 0. `bits` are those of a float32; -0 and +0 are equal.
PYARGS_HD uint64_t topk_key(uint32_t bits, uint32_t index) {
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t ordered = magnitude == 0 ? 0x80000000u : (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
  if (magnitude > 0x7f800000u) ordered = 0xffffffffu;
  return (static_cast<uint64_t>(ordered) << 32) | (0xffffffffu - index);
}

PYARGS_HD uint32_t key_index(uint64_t key) { return 0xffffffffu - static_cast<uint32_t>(key); }

// The bits of the float32 in a key.
PYARGS_HD uint32_t key_bits(uint64_t key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  return (ordered & 0x80000000u) ? ordered & 0x7fffffffu : ~ordered;
}

// Bits of the float32 with the value of a float16. Subnormals are normalised by integers, so that no flush-to-zero
// mode matters.
PYARGS_HD uint32_t float16_to_float32_bits(uint32_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, magnitude = (half & 0x7fffu) << 13;
  if (magnitude >= (31u << 23)) return sign | 0x7f800000u | magnitude;  // inf, NaN
  if (magnitude >= (1u << 23)) return sign | (magnitude + (112u << 23));
  uint32_t fraction = magnitude, exponent = 113u << 23;
  if (fraction == 0) return sign;
  for (; fraction < (1u << 23); fraction <<= 1) exponent -= 1u << 23;
  return sign | (exponent + (fraction - (1u << 23)));
}

// Bits of the bfloat16, and of the float16, that is nearest to a float32, ties to even. NaN stays NaN.
PYARGS_HD uint32_t bfloat16_bits(uint32_t bits) {
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bits >> 16 | 0x40u;
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

PYARGS_HD uint32_t float16_bits(uint32_t bits) {
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more are infinite
  if (magnitude < 0x33000000u) return sign;             // below half of the smallest
  const uint32_t exponent = magnitude >> 23;
  const bool normal = exponent >= 113;
  // What is cut off, at `shift`, decides whether one is added.
  const uint32_t shift = normal ? 13 : 126 - exponent;
  const uint32_t number = normal ? magnitude - (112u << 23) : (magnitude & 0x7fffffu) | 0x800000u;
  return sign | ((number + (1u << (shift - 1)) - 1 + (number >> shift & 1u)) >> shift);
}

}  // namespace pyargs
