// Products with weights that share a scale in groups of 32: rows in int8 or in float32. Everything is static: each
// capability keeps its own copy.
#pragma once

#include <math.h>

#include "gemm.h"

#ifdef __ARM_FEATURE_DOTPROD
#include <arm_neon.h>
#endif

namespace pyargs::stack {
namespace {

// A processor with fused operations rounds a product and its sum once, others twice. What must be the same everywhere
// is multiplied, and taken apart, and added.
template <class T>
inline void apart(T& values) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, Vector>) {
    asm("" : "+v"(values));
    return;
  }
#endif
  asm("" : "+m"(values));
}

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which the lowest bits then hold

// Rows for int8 weights. A group is quantised by its largest value; one with NaN or infinity gives NaN.
struct Int8 {
  using Element = Int8Group;
  static constexpr Format kFormat = Format::kInt8;
  static constexpr int64_t kValues = kGroup;
  static constexpr int kDepth = 1;

  // Fills whole groups: with zeros behind the last of n values.
  static void put(Int8Group* out, const float* values, int64_t n) {
    for (; n > 0; n -= kGroup, values += kGroup, ++out) {
      float x[kGroup] = {}, largest = 0.0f, odd = 0.0f;
      std::memcpy(x, values, min(n, kGroup) * sizeof *x);
#pragma omp simd reduction(max : largest) reduction(+ : odd)
      for (int i = 0; i < kGroup; ++i) {
        const float size = x[i] < 0.0f ? -x[i] : x[i];
        largest = size > largest ? size : largest;
        odd += x[i] - x[i];
      }
      const bool finite = odd == 0.0f;
      const float inverse = finite && largest > kShortest * kShortest ? 127.0f / largest : 0.0f;
      out->scale = !finite ? NAN : inverse > 0.0f ? largest / 127.0f : 0.0f;
#pragma omp simd
      for (int i = 0; i < kGroup; ++i) x[i] = finite ? x[i] * inverse : 0.0f;
      apart(x);
      int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int i = 0; i < kGroup; ++i) {
        const auto value = static_cast<int8_t>(bits_from_float(x[i] + kRound) & 0xffu);
        out->value[i] = value;
        sum += value;
      }
      out->sum = sum;
    }
  }

  static const float* floats(const Int8Group* x, int64_t n, float* buffer) {
    for (int64_t i = 0; i < n; ++i) {
      buffer[i] = x[i / kGroup].scale * static_cast<float>(x[i / kGroup].value[i % kGroup]);
    }
    return buffer;
  }
};

// kWidth float16 numbers.
inline Vector halves(const char* p) {
#if defined(__AVX512F__)
  return (Vector)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Vector)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  float values[kWidth];
  for (int i = 0; i < kWidth; ++i) {
    uint16_t half;
    std::memcpy(&half, p + i * sizeof half, sizeof half);
    values[i] = float_from_float16(half);
  }
  return load(values);
#endif
}

// Calls f(d, weights) for each depth of a group of kInt8 or kInt4, with the weights of the panel as floats: exactly
// those that the file's format stands for. `ahead`: bytes from what is read to what is fetched.
template <Format format, class F>
inline __attribute__((always_inline)) void depths(const char* group, int64_t ahead, const F& f) {
  constexpr int kHeld = format == Format::kInt8 ? 4 : 8;  // depths in 32 bits
  constexpr int kBits = 32 / kHeld;
  // Four bits are not moved to the lowest place: where they stand they count 16^j times as much, and their scale as
  // much less, which is exact. The highest would be a sign, and are moved.
  constexpr int kScales = format == Format::kInt8 ? 1 : kHeld - 1;
  Vector scale[kScales][kVectors], offset[kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    scale[0][v] = halves(group + v * kWidth * 2);
#pragma GCC unroll 8
    for (int j = 1; j < kScales; ++j) scale[j][v] = scale[j - 1][v] * 0.0625f;
    if constexpr (format == Format::kInt4) offset[v] = halves(group + (kVectors + v) * kWidth * 2);
  }
  __builtin_prefetch(group + ahead);
  group += kPanel * (format == Format::kInt8 ? 2 : 4);
  for (int64_t i = 0; i < kGroup; i += kHeld, group += kPanel * sizeof(int32_t)) {
    Bits held[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) held[v] = (Bits)load(group + v * sizeof(Vector));
    __builtin_prefetch(group + ahead);
    __builtin_prefetch(group + ahead + 64);
#pragma GCC unroll 16
    for (int j = 0; j < kHeld; ++j) {
      Vector weights[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        if constexpr (format == Format::kInt8) {
          const Integers q = (Integers)(held[v] << (32 - kBits - kBits * j)) >> (32 - kBits);
          weights[v] = __builtin_convertvector(q, Vector) * scale[0][v];
        } else {
          const Integers q = (Integers)(j < kScales ? held[v] & (15u << (kBits * j)) : held[v] >> (kBits * j));
          weights[v] = __builtin_convertvector(q, Vector) * scale[j < kScales ? j : 0][v] + offset[v];
        }
      }
      f(i + j, weights);
    }
  }
}

// sums [rows, kPanel] += x [rows, depth] times a panel of kInt8 or kInt4: the same bits as with these weights in
// float32.
template <Format format, int rows>
void grouped_block(const float* x, int64_t x_stride, const char* w, int64_t depth, float* sums, int64_t sums_stride) {
  Vector sum[rows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) sum[r][v] = load(sums + r * sums_stride + v * kWidth);
  }
  constexpr int64_t kBytes = panel_bytes(format, kGroup);
  for (int64_t d = 0; d < depth; d += kGroup, w += kBytes) {
    depths<format>(w, 4 * kBytes, [&](int64_t i, const Vector* weights) __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const float input = x[r * x_stride + d + i];
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) sum[r][v] += weights[v] * input;
      }
    });
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) store(sums + r * sums_stride + v * kWidth, sum[r][v]);
  }
}

// The same for any number of rows. For more than a few, a part of the panel is written out in float32 first.
template <Format format>
void multiply_grouped(int64_t rows, const float* x, int64_t x_stride, const char* w, int64_t depth, float* sums,
                      int64_t sums_stride) {
  constexpr int kFew = kBlockRows < 4 ? kBlockRows : 4;
  if (rows <= kFew) {
    with_rows(rows, std::make_integer_sequence<int, kFew>(), [&](auto count) {
      grouped_block<format, decltype(count)::value>(x, x_stride, w, depth, sums, sums_stride);
    });
    return;
  }
  constexpr int64_t kPart = 4 * kGroup, kBytes = panel_bytes(format, kGroup);
  alignas(64) float part[kPart * kPanel];
  for (int64_t start = 0; start < depth; start += kPart) {
    const int64_t count = min(kPart, depth - start);
    for (int64_t d = 0; d < count; d += kGroup, w += kBytes) {
      depths<format>(w, 4 * kBytes, [&](int64_t i, const Vector* weights) __attribute__((always_inline)) {
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) store(part + (d + i) * kPanel + v * kWidth, weights[v]);
      });
    }
    multiply<Float32>(rows, x + start, x_stride, part, kPanel, count, sums, sums_stride);
  }
}

// Sums of four products of int8 in each 32 bits: exact, whichever way a processor has for them. Weights are -128 to
// 127, inputs -127 to 127.
struct Products {
#if defined(__AVX512VNNI__)
  __m512i size;  // unsigned: 128 is added, and 128 times the inputs is taken away
  explicit Products(const char* p) : size(_mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128))) {}
  static Integers begin(int32_t inputs) { return Integers{} - 128 * inputs; }
  Integers add(Integers sum, int32_t four) const {
    return (Integers)_mm512_dpbusd_epi32((__m512i)sum, size, _mm512_set1_epi32(four));
  }
#elif defined(__AVX512F__)
  __m512i size;
  __mmask64 negative;
  explicit Products(const char* p) {
    const __m512i w = _mm512_loadu_si512(p);
    size = _mm512_abs_epi8(w);
    negative = _mm512_movepi8_mask(w);
  }
  static Integers begin(int32_t) { return Integers{}; }
  Integers add(Integers sum, int32_t four) const {
    const __m512i x = _mm512_set1_epi32(four);
    const __m512i by = _mm512_mask_sub_epi8(x, negative, _mm512_setzero_si512(), x);
    return sum + (Integers)_mm512_madd_epi16(_mm512_maddubs_epi16(size, by), _mm512_set1_epi16(1));
  }
#elif defined(__AVX2__)
  __m256i value, size;
  explicit Products(const char* p) {
    value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    size = _mm256_abs_epi8(value);
  }
  static Integers begin(int32_t) { return Integers{}; }
  Integers add(Integers sum, int32_t four) const {  // two products of 128 * 127 at most stay within 16 bits
    const __m256i by = _mm256_sign_epi8(_mm256_set1_epi32(four), value);
    return sum + (Integers)_mm256_madd_epi16(_mm256_maddubs_epi16(size, by), _mm256_set1_epi16(1));
  }
#elif defined(__ARM_FEATURE_DOTPROD)
  int8x16_t value;
  explicit Products(const char* p) : value(vld1q_s8(reinterpret_cast<const int8_t*>(p))) {}
  static Integers begin(int32_t) { return Integers{}; }
  Integers add(Integers sum, int32_t four) const {
    return (Integers)vdotq_s32((int32x4_t)sum, value, vreinterpretq_s8_s32(vdupq_n_s32(four)));
  }
#else
  Integers of[4];
  explicit Products(const char* p) {
    const Bits held = (Bits)load(p);
    for (int j = 0; j < 4; ++j) of[j] = (Integers)(held << (24 - 8 * j)) >> 24;
  }
  static Integers begin(int32_t) { return Integers{}; }
  Integers add(Integers sum, int32_t four) const {
    for (int j = 0; j < 4; ++j) sum += of[j] * static_cast<int8_t>(four >> (8 * j) & 0xff);
    return sum;
  }
#endif
};

// sums [rows, kPanel] += x [rows, groups] times a panel of kInt8: within a group exact, then group by group; the same
// bits on every processor.
template <int rows>
void int8_block(const Int8Group* x, int64_t x_stride, const char* w, int64_t groups, float* sums, int64_t sums_stride) {
  constexpr int64_t kBytes = panel_bytes(Format::kInt8, kGroup), kAhead = 4 * kBytes;
  for (int64_t g = 0; g < groups; ++g, ++x, w += kBytes) {
    Integers sum[rows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Products::begin(x[r * x_stride].sum);
    }
    __builtin_prefetch(w + kAhead);
#pragma GCC unroll 2
    for (int64_t i = 0; i < kGroup; i += 4) {
      const char* from = w + kPanel * 2 + i * kPanel;
      __builtin_prefetch(from + kAhead);
      __builtin_prefetch(from + kAhead + 64);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        const Products products(from + v * sizeof(Vector));
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
          int32_t four;
          std::memcpy(&four, x[r * x_stride].value + i, sizeof four);
          sum[r][v] = products.add(sum[r][v], four);
        }
      }
    }
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const Vector scale = halves(w + v * kWidth * 2);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        Vector product = __builtin_convertvector(sum[r][v], Vector) * (scale * x[r * x_stride].scale);
        apart(product);
        float* to = sums + r * sums_stride + v * kWidth;
        store(to, load(to) + product);
      }
    }
  }
}

// The same for any number of rows.
inline void multiply_int8(int64_t rows, const Int8Group* x, int64_t x_stride, const char* w, int64_t groups,
                          float* sums, int64_t sums_stride) {
  constexpr int kMost = kBlockRows < 8 ? kBlockRows : 8;  // with more, sums leave the registers
  in_blocks<kMost>(rows, [&](int64_t begin, auto count) {
    int8_block<decltype(count)::value>(x + begin * x_stride, x_stride, w, groups, sums + begin * sums_stride,
                                       sums_stride);
  });
}

// sums [rows, kPanel] += x [rows, depth] times a part of a panel of this format.
template <class T>
void multiply_panel(Format format, int64_t rows, const typename T::Element* x, int64_t x_stride, const char* w,
                    int64_t depth, float* sums, int64_t sums_stride) {
  if constexpr (T::kFormat == Format::kInt8) {
    multiply_int8(rows, x, x_stride, w, depth / kGroup, sums, sums_stride);
  } else {
    if constexpr (T::kFormat == Format::kFloat32) {
      if (format == Format::kInt8)
        return multiply_grouped<Format::kInt8>(rows, x, x_stride, w, depth, sums, sums_stride);
      if (format == Format::kInt4)
        return multiply_grouped<Format::kInt4>(rows, x, x_stride, w, depth, sums, sums_stride);
    }
    multiply<T>(rows, x, x_stride, reinterpret_cast<const typename T::Element*>(w), kPanel * T::kDepth, depth, sums,
                sums_stride);
  }
}

}  // namespace
}  // namespace pyargs::stack
