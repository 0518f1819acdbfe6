// user_mlp: the first layer of every row's own MLP, out[b, j, h] = sum_d bank[user[b], h, d] * hidden[b, j, d]. See
// pyargs/ops/user_mlp.py for the contract.
//
// The bank is read where it lies: no user's matrix is gathered first. A block of a few candidates times 4 units keeps
// its sums in registers, as vectors over d, so that what is loaded once is used several times; the lanes of each sum
// are added in pairs at the end. Every (candidate, unit) adds in the same order whatever block it is in, so a result
// depends neither on the batch nor on the number of threads.

#include <cmath>
#include <type_traits>

#include "../rows.h"
#include "floats.h"

namespace pyargs {

constexpr int kUnits = 4;  // of one block

namespace PYARGS_CPU {
namespace {

// In registers: kMaxRows * kUnits sums, kMaxRows candidates, a vector of the bank.
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
  const W* units[kUnits];
  for (int j = 0; j < kRows; ++j) rows[j] = x + j * x_stride;
  for (int h = 0; h < kUnits; ++h) units[h] = w[h];
  Vec acc[kRows][kUnits] = {};
  const auto step = [&](auto&& get) {
    Vec xs[kRows];
#pragma GCC unroll 8
    for (int j = 0; j < kRows; ++j) xs[j] = get(rows[j]);
#pragma GCC unroll 8
    for (int h = 0; h < kUnits; ++h) {
      const Vec ws = get(units[h]);
#pragma GCC unroll 8
      for (int j = 0; j < kRows; ++j) acc[j][h] += xs[j] * ws;
    }
  };
  const int rest = n % kWidth, whole = n - rest;
  for (int i = 0; i < whole; i += kWidth) {
#pragma GCC unroll 8
    for (int h = 0; h < kUnits; ++h) __builtin_prefetch(units[h] + ahead + i, 0, 2);
    step([i](const auto* p) { return load(p + i); });
  }
  if (rest) step([=](const auto* p) { return load_some(p + whole, rest); });

  constexpr int kSums = kRows * kUnits;
  alignas(64) float lanes[kSums * kWidth], pairs[kSums * kWidth / 2];
#pragma GCC unroll 8
  for (int j = 0; j < kRows; ++j) {
#pragma GCC unroll 8
    for (int h = 0; h < kUnits; ++h) std::memcpy(lanes + (j * kUnits + h) * kWidth, &acc[j][h], sizeof(Vec));
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
  alignas(64) float x_buffer[kGroup * kPitch], w_buffer[direct ? 1 : kUnits * kPitch], sums[kMaxRows * kUnits];
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
      for (int64_t h = begin; h < end; h += kUnits) {
        const int valid = static_cast<int>(end - h < kUnits ? end - h : kUnits);
        const Read* w[kUnits];
        for (int i = 0; i < kUnits; ++i) {
          const int64_t unit = h + (i < valid ? i : valid - 1);  // past the end: again the last, and not stored
          if constexpr (direct) {
            w[i] = bank + unit * rows.bank_stride_h;
          } else {
            w[i] = as_floats(rows.bank_dtype, bank, unit * rows.bank_stride_h, n, w_buffer + i * kPitch);
          }
        }
        const int64_t ahead = direct && h + kUnits < end ? kUnits * rows.bank_stride_h : 0;
        for (int done = 0; done < group;) {
          const int count = part(group - done, kMaxRows);
          block(count, x + done * x_stride, x_stride, w, ahead, n, sums);
          for (int j = 0; j < count; ++j) {
            float* to = out + (first + done + j) * rows.units + h;
            for (int i = 0; i < valid; ++i) to[i] = start > 0 ? to[i] + sums[j * kUnits + i] : sums[j * kUnits + i];
          }
          done += count;
        }
      }
      first += group;
    }
  }
}

}  // namespace

// Blocks begin ... end - 1 of all rows' blocks of kUnits units.
void user_mlp_blocks(const UserMlpRows& rows, int64_t begin, int64_t end) {
  const auto work = rows.bank_dtype == Dtype::kFloat32    ? row_units<float>
                    : rows.bank_dtype == Dtype::kBFloat16 ? row_units<BFloat16>
                                                          : row_units<Float16>;
  const int64_t blocks = ceil_div(rows.units, kUnits);
  while (begin < end) {
    const int64_t row = begin / blocks, first = begin % blocks;
    const int64_t last = first + (end - begin) < blocks ? first + (end - begin) : blocks;
    work(rows, row, first * kUnits, last * kUnits < rows.units ? last * kUnits : rows.units);
    begin += last - first;
  }
}

}  // namespace PYARGS_CPU

#ifdef PYARGS_X86
namespace avx2 {
void user_mlp_blocks(const UserMlpRows&, int64_t, int64_t);
}
namespace avx512 {
void user_mlp_blocks(const UserMlpRows&, int64_t, int64_t);
}
#endif

}  // namespace pyargs

#ifdef PYARGS_HOST  // the op: schema, checks, threads

#include "../../ops/tensor.h"
#ifdef PYARGS_CUDA_ARCHS
#include "../cuda/launch.h"
#endif

namespace pyargs {
namespace {

using Run = void (*)(const UserMlpRows&, int64_t batch, const Array& like);

void run_on_cpu(const UserMlpRows& rows, int64_t batch, const Array&) {
  const int64_t blocks = batch * ((rows.units + kUnits - 1) / kUnits);
  const int64_t grain = 1 + (1 << 18) / (rows.k * rows.dim * kUnits);  // less is not worth waking a thread
  if (blocks <= grain) {
    PYARGS_DISPATCH(user_mlp_blocks, rows, 0, blocks);
  } else {
    torch::stable::parallel_for(
        0, blocks, grain, [&rows](int64_t begin, int64_t end) { PYARGS_DISPATCH(user_mlp_blocks, rows, begin, end); });
  }
}

#ifdef PYARGS_CUDA_ARCHS
void run_on_cuda(const UserMlpRows& rows, int64_t batch, const Array& like) {
  check_launch(cuda::user_mlp(rows, batch, like.device_index(), cuda_stream(like)));
}
#endif

// The handles are ours: boxed arguments come owned, and results are given away.
template <Run run>
StableIValue user_mlp(AtenTensorHandle hidden_handle, AtenTensorHandle bank_handle, AtenTensorHandle user_handle) {
  Array hidden(hidden_handle), bank(bank_handle), user(user_handle);
#ifdef PYARGS_CUDA_ARCHS
  if (run == run_on_cuda) check_one_device({&hidden, &bank, &user});
#endif
  check(hidden.dim() == 3 && hidden.size(1) >= 1 && hidden.size(2) >= 1, "hidden must be [B, k, D], k and D >= 1");
  UserMlpRows rows{};
  const int64_t batch = hidden.size(0);
  rows.k = hidden.size(1);
  rows.dim = hidden.size(2);
  check(bank.dim() == 3 && bank.size(0) >= 1 && bank.size(1) >= 1 && bank.size(2) == rows.dim,
        "bank must be [U, H, D], U and H >= 1");
  rows.users = bank.size(0);
  rows.units = bank.size(1);
  rows.hidden_dtype = hidden.float_dtype("hidden must be float32, bfloat16 or float16");
  rows.bank_dtype = bank.float_dtype("bank must be float32, bfloat16 or float16");
  user.require({batch}, aoti_torch_dtype_int64(), "user must be [B] int64");
  hidden.require_dense_rows();
  bank.require_dense_rows();
  rows.hidden = hidden.data();
  rows.hidden_stride_b = hidden.stride(0);
  rows.hidden_stride_k = hidden.stride(1);
  rows.bank = bank.data();
  rows.bank_stride_u = bank.stride(0);
  rows.bank_stride_h = bank.stride(1);
  rows.user = user.data<int64_t>();

  Result out({batch, rows.k, rows.units}, aoti_torch_dtype_float32(), hidden);
  rows.out = out.data<float>();

  if (batch > 0) run(rows, batch, hidden);
  return out.release();
}

}  // namespace
}  // namespace pyargs

STABLE_TORCH_LIBRARY_FRAGMENT(pyargs, m) { m.def("user_mlp(Tensor hidden, Tensor bank, Tensor user) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(pyargs, CPU, m) { m.impl("user_mlp", TORCH_BOX(&pyargs::user_mlp<pyargs::run_on_cpu>)); }

#ifdef PYARGS_CUDA_ARCHS
STABLE_TORCH_LIBRARY_IMPL(pyargs, CUDA, m) { m.impl("user_mlp", TORCH_BOX(&pyargs::user_mlp<pyargs::run_on_cuda>)); }
#endif

#endif  // PYARGS_HOST
