// AVX-512 on a processor that has none: SIMDe's functions (https://github.com/simd-everywhere/simde) in the place of
// the compiler's. Included behind every header of the library, whose own code it must not change.
#pragma once

#include <immintrin.h>

#include <type_traits>
#include <utility>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

// SIMDe 0.7 has not these two.
static inline simde__m512i emulated_madd_epi16(simde__m512i a, simde__m512i b) {
  __m256i halves[2][2];
  std::memcpy(halves[0], &a, sizeof a);
  std::memcpy(halves[1], &b, sizeof b);
  for (int i = 0; i < 2; ++i) halves[0][i] = _mm256_madd_epi16(halves[0][i], halves[1][i]);
  std::memcpy(&a, halves[0], sizeof a);
  return a;
}
static inline simde__m512 emulated_cvtph_ps(__m256i a) {
  __m128i halves[2];
  __m256 floats[2];
  std::memcpy(halves, &a, sizeof a);
  for (int i = 0; i < 2; ++i) floats[i] = _mm256_cvtph_ps(halves[i]);
  simde__m512 found;
  std::memcpy(&found, floats, sizeof found);
  return found;
}
#undef _mm512_madd_epi16
#define _mm512_madd_epi16(a, b) emulated_madd_epi16(a, b)
#undef _mm512_maskz_cvtph_ps
#define _mm512_maskz_cvtph_ps(mask, a) emulated_cvtph_ps(a)

#define __AVX512F__ 1
#define __AVX512BW__ 1
#if PYARGS_EMULATE_AVX512 == 2
#define __AVX512VNNI__ 1
#endif
#undef __x86_64__  // grouped.h would keep a vector of 64 bytes in a register
