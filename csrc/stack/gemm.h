// Matrix products with packed panels. Everything is static: each capability keeps its own copy.
//
// A product is summed over the depth in one order, whatever the number of rows, so a row's result does not depend on
// the rows beside it: a token has the same state, bit by bit, in a prompt, alone, and among branches.
#pragma once

#include <type_traits>
#include <utility>

#include "../kernels/cpu/floats.h"
#include "pass.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace pyargs::stack {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16, kBlockRows = 12;  // 24 sums, 2 vectors of weights and 1 of x: 27 of 32 registers
#elif defined(__AVX2__)
constexpr int kWidth = 8, kBlockRows = 2;
#else
constexpr int kWidth = 4, kBlockRows = 1;
#endif
constexpr int kVectors = kPanel / kWidth;
constexpr int64_t kScreenAhead = 4 * kGroupBytes;  // bytes from what is multiplied to what is fetched

typedef float Vector __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Bits __attribute__((vector_size(4 * kWidth)));
typedef int32_t Integers __attribute__((vector_size(4 * kWidth)));

// Those of <algorithm> would be shared with files for other capabilities.
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }

// From and to any alignment and type. (A template that takes such a type by its name loses the alignment.)
typedef float AnyVector __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
inline Vector load(const void* p) { return *static_cast<const AnyVector*>(p); }
inline void store(float* p, Vector value) { *reinterpret_cast<AnyVector*>(p) = value; }

struct Float32 {
  using Element = float;
  static constexpr Format kFormat = Format::kFloat32;
  static constexpr int64_t kValues = 1;  // of an Element
  static constexpr int kDepth = 1;       // of one multiplication
  using Input = float;
  static Input input(const float* x) { return *x; }
  static Vector multiply_add(Vector w, Input x, Vector sum) { return sum + w * x; }
  static void put(float* out, const float* values, int64_t n) { std::memcpy(out, values, n * sizeof *values); }
  static const float* floats(const float* x, int64_t, float*) { return x; }
};

struct BFloat16 {
  using Element = uint16_t;
  static constexpr Format kFormat = Format::kBFloat16;
  static constexpr int64_t kValues = 1;
  static constexpr int kDepth = 2;
#ifdef __AVX512BF16__
  using Input = Vector;
  static Input input(const uint16_t* x) {
    int pair;
    std::memcpy(&pair, x, sizeof pair);
    return (Vector)_mm512_set1_epi32(pair);
  }
  static Vector multiply_add(Vector w, Input x, Vector sum) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
  }
#else
  struct Input {
    float first, second;
  };
  static Input input(const uint16_t* x) { return {float_from_bfloat16(x[0]), float_from_bfloat16(x[1])}; }
  static Vector multiply_add(Vector weights, Input x, Vector sum) {
    const Bits w = (Bits)weights;
    sum = sum + (Vector)(w << 16) * x.first;
    return sum + (Vector)(w & 0xffff0000u) * x.second;
  }
#endif
  static void put(uint16_t* out, const float* values, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = bfloat16_from_float(values[i]);
  }
  static const float* floats(const uint16_t* x, int64_t n, float* buffer) {
    return as_floats(Dtype::kBFloat16, x, 0, static_cast<int>(n), buffer);
  }
};

// sums [rows, kPanel] += x [rows, depth] times one panel; w_stride: elements from one depth of the panel to the next;
// ahead: elements from what is multiplied to what is fetched.
template <class T, int rows>
void block(const typename T::Element* x, int64_t x_stride, const typename T::Element* w, int64_t w_stride,
           int64_t depth, int64_t ahead, float* sums, int64_t sums_stride) {
  Vector sum[rows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) sum[r][v] = load(sums + r * sums_stride + v * kWidth);
  }
  for (int64_t d = 0; d < depth; d += T::kDepth, w += w_stride) {
    Vector weights[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) weights[v] = load(w + v * kWidth * T::kDepth);
    // A panel that comes from memory: the hardware does not look beyond a page. To the first level if there is little
    // to compute; else to the second, for x needs the first.
    constexpr int kLevel = rows <= 4 ? 3 : 2;
    __builtin_prefetch(w + ahead, 0, kLevel);
    __builtin_prefetch(w + ahead + kPanel * T::kDepth / 2, 0, kLevel);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const typename T::Input input = T::input(x + r * x_stride + d);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[r][v] = T::multiply_add(weights[v], input, sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) store(sums + r * sums_stride + v * kWidth, sum[r][v]);
  }
}

template <class F, int... rows>
void with_rows(int64_t count, std::integer_sequence<int, rows...>, const F& f) {
  (void)((count == rows + 1 && (f(std::integral_constant<int, rows + 1>()), true)) || ...);
}

// Calls f(begin, count) for blocks of nearly equal size, of `most` rows; the count is a constant.
template <int most = kBlockRows, class F>
void in_blocks(int64_t rows, const F& f) {
  const int64_t blocks = (rows + most - 1) / most;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t begin = rows * b / blocks;
    with_rows(rows * (b + 1) / blocks - begin, std::make_integer_sequence<int, most>(),
              [&](auto count) { f(begin, count); });
  }
}

// The same for any number of rows.
template <class T>
void multiply(int64_t rows, const typename T::Element* x, int64_t x_stride, const typename T::Element* w,
              int64_t w_stride, int64_t depth, float* sums, int64_t sums_stride) {
  in_blocks(rows, [&](int64_t begin, auto count) {
    constexpr int kCount = decltype(count)::value;
    const int64_t ahead = begin > 0 ? 0 : (kCount <= 4 ? 16 : 64) * w_stride;  // later blocks find it in the cache
    block<T, kCount>(x + begin * x_stride, x_stride, w, w_stride, depth, ahead, sums + begin * sums_stride,
                     sums_stride);
  });
}

// sums [rows, kPanel] += x [rows, depth] times a panel of a Screen.
template <int rows>
void screen_block(const float* x, int64_t x_stride, const char* panel, int64_t depth, float* sums) {
  for (int64_t d = 0; d < depth; d += kGroup, panel += kGroupBytes) {
    const char* w = panel + kPanel * sizeof(float);
    Vector sum[rows][kVectors] = {};
    for (int64_t i = 0; i < kGroup; i += 4) {
      Bits four[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        four[v] = (Bits)load(w + i * kPanel + v * sizeof(Vector));
        __builtin_prefetch(w + i * kPanel + v * sizeof(Vector) + kScreenAhead);
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        Vector weights[kVectors];
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          weights[v] = __builtin_convertvector((Integers)(four[v] << (24 - 8 * j)) >> 24, Vector);
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
          const float input = x[r * x_stride + d + i + j];
#pragma GCC unroll 16
          for (int v = 0; v < kVectors; ++v) sum[r][v] += weights[v] * input;
        }
      }
    }
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const Vector scale = load(panel + v * sizeof(Vector));
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        float* to = sums + r * kPanel + v * kWidth;
        store(to, load(to) + sum[r][v] * scale);
      }
    }
  }
}

// The same for any number of rows.
inline void multiply_screen(int64_t rows, const float* x, int64_t x_stride, const char* panel, int64_t depth,
                            float* sums) {
  in_blocks(rows, [&](int64_t begin, auto count) {
    screen_block<decltype(count)::value>(x + begin * x_stride, x_stride, panel, depth, sums + begin * kPanel);
  });
}

inline float dot(const float* x, const float* y, int64_t n) {
  constexpr int kSums = 4;  // one alone would wait for itself
  Vector sum[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kWidth <= n; i += kSums * kWidth) {
#pragma GCC unroll 4
    for (int s = 0; s < kSums; ++s) sum[s] += load(x + i + s * kWidth) * load(y + i + s * kWidth);
  }
  for (; i + kWidth <= n; i += kWidth) sum[0] += load(x + i) * load(y + i);
  float lanes[kWidth];
  store(lanes, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  for (; i < n; ++i) lanes[0] += x[i] * y[i];
  return lanes[0];
}

}  // namespace
}  // namespace pyargs::stack
