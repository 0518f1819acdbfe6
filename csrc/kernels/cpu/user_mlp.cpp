// user_mlp: the first layer of every row's own MLP, out[b, j, h] = sum_d bank[user[b], h, d] * hidden[b, j, d]. See
// pyargs/ops/user_mlp.py for the contract.
//
// The bank is read where it lies: no user's matrix is gathered first. A block of a few candidates times 4 units keeps
// its sums in registers, as vectors over d, so that what is loaded once is used several times; the lanes of each sum
// are added in pairs at the end. Every (candidate, unit) adds in the same order whatever block it is in, so a result
// depends neither on the batch nor on the number of threads.

#include <cmath>
#include <type_traits>

#include "floats.h"
#include "launch.h"

namespace pyargs {
namespace PYARGS_CPU {
namespace {

// In registers: kMaxRows * kMlpUnits sums, kMaxRows candidates, a vector of the bank.
#if defined(__AVX512F__)
constexpr int kWidth = 16, kMaxRows = 6;
#elif defined(__AVX2__)
constexpr int kWidth = 8, kMaxRows = 3;
#else
constexpr int kWidth = 4, kMaxRows = 2;
#endif
constexpr int kTile = 1024;           // of D
constexpr int kPitch = kTile + 16;    // of buffered candidates: 4096 bytes apart they would share one set of the cache
constexpr int kGroup = 4 * kMaxRows;  // candidates that are buffered at a time

typedef float Vec __attribute__((vector_size(kWidth * sizeof(float))));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// The first n < kWidth, then zeros.
inline Vec load_some(const float* p, int n) {
  alignas(sizeof(Vec)) float lanes[kWidth];
#pragma omp simd
  for (int l = 0; l < kWidth; ++l) lanes[l] = l < n ? p[l] : 0.0f;
  return load(lanes);
}

// With AVX-512 a bank of halves is converted between the products. The others convert 4 units at a time before them:
// with their smaller blocks they would do it again for every 2 or 3 candidates.
#ifdef __AVX512F__
inline Vec load(const BFloat16* p) {
  return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(
      0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}

inline Vec load(const Float16* p) {
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

template <class Half>
inline Vec load_some(const Half* p, int n) {
  Half lanes[kWidth];
#pragma omp simd
  for (int l = 0; l < kWidth; ++l) lanes[l].bits = l < n ? p[l].bits : 0;
  return load(lanes);
}
#endif

// sums[j, h] = sum of x[j] * w[h] over n. What lies `ahead` elements after w is fetched meanwhile: the next units,
// which the processor does not foresee.
template <int kRows, class W>
inline void block(const float* x, int64_t x_stride, const W* const* w, int64_t ahead, int n, float* sums) {
  const float* rows[kRows];
  const W* units[kMlpUnits];
  for (int j = 0; j < kRows; ++j) rows[j] = x + j * x_stride;
  for (int h = 0; h < kMlpUnits; ++h) units[h] = w[h];
  Vec acc[kRows][kMlpUnits] = {};
  const auto step = [&](auto&& get) {
    Vec xs[kRows];
#pragma GCC unroll 8
    for (int j = 0; j < kRows; ++j) xs[j] = get(rows[j]);
#pragma GCC unroll 8
    for (int h = 0; h < kMlpUnits; ++h) {
      const Vec ws = get(units[h]);
#pragma GCC unroll 8
      for (int j = 0; j < kRows; ++j) acc[j][h] += xs[j] * ws;
    }
  };
  const int rest = n % kWidth, whole = n - rest;
  for (int i = 0; i < whole; i += kWidth) {
#pragma GCC unroll 8
    for (int h = 0; h < kMlpUnits; ++h) __builtin_prefetch(units[h] + ahead + i, 0, 2);
    step([i](const auto* p) { return load(p + i); });
  }
  if (rest) step([=](const auto* p) { return load_some(p + whole, rest); });

  constexpr int kSums = kRows * kMlpUnits;
  alignas(64) float lanes[kSums * kWidth], pairs[kSums * kWidth / 2];
#pragma GCC unroll 8
  for (int j = 0; j < kRows; ++j) {
#pragma GCC unroll 8
    for (int h = 0; h < kMlpUnits; ++h) std::memcpy(lanes + (j * kMlpUnits + h) * kWidth, &acc[j][h], sizeof(Vec));
  }
  const auto add_pairs = [](const float* __restrict from, float* __restrict to, int count) {
#pragma omp simd
    for (int i = 0; i < count; ++i) to[i] = from[2 * i] + from[2 * i + 1];
  };
  float *from = lanes, *to = pairs;
#pragma GCC unroll 4
  for (int count = kSums * kWidth / 2; count > kSums; count /= 2) {
    add_pairs(from, to, count);
    float* const done = to;
    to = from;
    from = done;
  }
  add_pairs(from, sums, kSums);
}

template <int kRows = kMaxRows, class W>
inline void block(int count, const float* x, int64_t x_stride, const W* const* w, int64_t ahead, int n, float* sums) {
  if constexpr (kRows > 1) {
    if (count < kRows) return block<kRows - 1>(count, x, x_stride, w, ahead, n, sums);
  }
  block<kRows>(x, x_stride, w, ahead, n, sums);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The next part of `rest`, cut into as few and nearly equal parts of at most `most` as possible.
inline int part(int64_t rest, int64_t most) { return static_cast<int>(ceil_div(rest, ceil_div(rest, most))); }

// Units begin ... end - 1 of one row.
template <class W>
void row_units(const UserMlpRows& rows, int64_t row, int64_t begin, int64_t end) {
  float* out = rows.out + row * rows.k * rows.units;
  const int64_t user = rows.users > 1 ? rows.user[row] : 0;
  if (user < 0 || user >= rows.users) {
    for (int64_t j = 0; j < rows.k; ++j) {
      for (int64_t h = begin; h < end; ++h) out[j * rows.units + h] = NAN;
    }
    return;
  }
  // What a block reads: the bank itself, or floats made of it.
  constexpr bool direct = std::is_same_v<W, float> || kWidth == 16;
  using Read = std::conditional_t<direct, W, float>;
  alignas(64) float x_buffer[kGroup * kPitch], w_buffer[direct ? 1 : kMlpUnits * kPitch], sums[kMaxRows * kMlpUnits];
  const int64_t tile = ceil_div(part(rows.dim, kTile), kWidth) * kWidth;
  for (int64_t start = 0; start < rows.dim; start += tile) {
    const int n = static_cast<int>(rows.dim - start < tile ? rows.dim - start : tile);
    const W* bank = static_cast<const W*>(rows.bank) + user * rows.bank_stride_u + start;
    for (int64_t first = 0; first < rows.k;) {
      const int group = part(rows.k - first, kGroup);
      const int64_t at = row * rows.hidden_stride_b + first * rows.hidden_stride_k + start;
      const float* x = x_buffer;
      int64_t x_stride = kPitch;
      if (rows.hidden_dtype == Dtype::kFloat32) {
        x = static_cast<const float*>(rows.hidden) + at;
        x_stride = rows.hidden_stride_k;
      } else {
        for (int j = 0; j < group; ++j) {
          as_floats(rows.hidden_dtype, rows.hidden, at + j * rows.hidden_stride_k, n, x_buffer + j * kPitch);
        }
      }
      for (int64_t h = begin; h < end; h += kMlpUnits) {
        const int valid = static_cast<int>(end - h < kMlpUnits ? end - h : kMlpUnits);
        const Read* w[kMlpUnits];
        for (int i = 0; i < kMlpUnits; ++i) {
          const int64_t unit = h + (i < valid ? i : valid - 1);  // past the end: again the last, and not stored
          if constexpr (direct) {
            w[i] = bank + unit * rows.bank_stride_h;
          } else {
            w[i] = as_floats(rows.bank_dtype, bank, unit * rows.bank_stride_h, n, w_buffer + i * kPitch);
          }
        }
        const int64_t ahead = direct && h + kMlpUnits < end ? kMlpUnits * rows.bank_stride_h : 0;
        for (int done = 0; done < group;) {
          const int count = part(group - done, kMaxRows);
          block(count, x + done * x_stride, x_stride, w, ahead, n, sums);
          for (int j = 0; j < count; ++j) {
            float* to = out + (first + done + j) * rows.units + h;
            for (int i = 0; i < valid; ++i)
              to[i] = start > 0 ? to[i] + sums[j * kMlpUnits + i] : sums[j * kMlpUnits + i];
          }
          done += count;
        }
      }
      first += group;
    }
  }
}

}  // namespace

// Blocks begin ... end - 1 of all rows' blocks of kMlpUnits units.
void user_mlp(const UserMlpRows& rows, int64_t begin, int64_t end) {
  const auto work = rows.bank_dtype == Dtype::kFloat32    ? row_units<float>
                    : rows.bank_dtype == Dtype::kBFloat16 ? row_units<BFloat16>
                                                          : row_units<Float16>;
  const int64_t blocks = ceil_div(rows.units, kMlpUnits);
  while (begin < end) {
    const int64_t row = begin / blocks, first = begin % blocks;
    const int64_t last = first + (end - begin) < blocks ? first + (end - begin) : blocks;
    work(rows, row, first * kMlpUnits, last * kMlpUnits < rows.units ? last * kMlpUnits : rows.units);
    begin += last - first;
  }
}

}  // namespace PYARGS_CPU
}  // namespace pyargs
