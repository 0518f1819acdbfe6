// Small vectorisable pieces of the CPU kernels. Everything is static: each capability keeps its own copy.
#pragma once

#include "../common.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace pyargs {
namespace {

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_from_bfloat16(uint16_t half) { return float_from_bits(static_cast<uint32_t>(half) << 16); }

// Rounded to nearest, ties to even; NaN stays NaN.
inline uint16_t bfloat16_from_float(float value) {
  const uint32_t bits = bits_from_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}

// Without F16C. Subnormals go through a subtraction of normal numbers, so that flush-to-zero modes do not matter.
inline float float_from_float16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fffu) << 13;
  const float subnormal = float_from_bits(magnitude + (113u << 23)) - float_from_bits(113u << 23);
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t special = magnitude | 0x7f800000u;  // inf and NaN
  uint32_t bits = magnitude < (1u << 23) ? bits_from_float(subnormal) : normal;
  bits = magnitude >= (31u << 23) ? special : bits;
  return float_from_bits(bits | sign);
}

// n values of `dtype` at element `offset` of `source` as floats: the source itself, or `buffer` filled.
inline const float* as_floats(Dtype dtype, const void* source, int64_t offset, int n, float* __restrict buffer) {
  if (dtype == Dtype::kFloat32) return static_cast<const float*>(source) + offset;
  const uint16_t* halves = static_cast<const uint16_t*>(source) + offset;
  if (dtype == Dtype::kBFloat16) {
#pragma omp simd
    for (int i = 0; i < n; ++i) buffer[i] = float_from_bfloat16(halves[i]);
    return buffer;
  }
  int done = 0;
#ifdef __F16C__
  for (; done + 8 <= n; done += 8) {
    _mm256_storeu_ps(buffer + done, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + done))));
  }
#endif
#pragma omp simd
  for (int i = done; i < n; ++i) buffer[i] = float_from_float16(halves[i]);
  return buffer;
}

constexpr float kLog2E = 1.44269504f;
constexpr float kSmallest = -124.0f;  // exponents of 2 below this are raised to it; no sum that holds a 1 can feel it

// 2^t for t <= 0 as factor * power (so that a sum of them is one fused multiply-add), relative error 2e-7. NaN stays
// NaN. 2^t = 2^n 2^f with n = round(t) and a polynomial for 2^f. `smallest` is kSmallest.
struct Exponential {
  float factor, power;
};

inline Exponential exp2_parts(float t, float smallest) {
  // Adding 1.5 * 2^23 rounds to an integer; the 127 more put the exponent of 2^n into the lowest bits.
  constexpr float kRound = 12582912.0f + 127.0f;
  t = smallest > t ? smallest : t;
  const float shifted = t + kRound;
  const float f = t - (shifted - kRound);
  float p = 1.326472708e-3f;  // minimax on [-0.5, 0.5]
  p = p * f + 9.671512862e-3f;
  p = p * f + 5.550733746e-2f;
  p = p * f + 2.402224208e-1f;
  p = p * f + 6.931469776e-1f;
  p = p * f + 1.0f;
  return {p, float_from_bits(bits_from_float(shifted) << 23)};
}

inline float exp2_negative(float t) {
  const Exponential e = exp2_parts(t, kSmallest);
  return e.factor * e.power;
}

}  // namespace
}  // namespace pyargs
