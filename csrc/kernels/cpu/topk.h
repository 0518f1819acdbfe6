// The k best and the log-sum-exp of rows of logits on the CPU, in one pass. Everything is static: each capability keeps
// its own copy.
//
// A row is cut into chunks of 8192 and a chunk into blocks of 512. Per block: 64 lane maxima; if none of them beats
// the k-th best so far, the block holds no candidate; otherwise only the lanes that do are searched. Then the block's
// sum of exp(x - reference) while it is still in the first-level cache. Log-sum-exps are kept per chunk and merged in
// order of the chunks, so a row's result is the same for any batch and any number of threads; the k best are the same
// anyway, because (value, lower id) is a total order.
#pragma once

#include <cmath>

#include "floats.h"
#include "launch.h"

namespace pyargs {
namespace {

constexpr int kBlock = 512, kLanes = 64;

// The k best so far, best first, as keys (common.h); 0 where there are fewer.
struct Best {
  uint64_t key[kMaxTopK];
  int k;
  float worst;  // value of the last, -inf while there are fewer than k

  void clear() {
    for (int j = 0; j < k; ++j) key[j] = 0;
    worst = -INFINITY;
  }
  bool full() const { return key[k - 1] != 0; }

  void insert(uint64_t added) {
    if (added <= key[k - 1]) return;
    int j = k - 1;
    for (; j > 0 && key[j - 1] < added; --j) key[j] = key[j - 1];
    key[j] = added;
    if (full()) worst = float_from_bits(key_bits(key[k - 1]));
  }
  void insert(float value, int64_t id) { insert(topk_key(bits_from_float(value), static_cast<uint32_t>(id))); }
};

// Maximum of each lane (elements l, l + 64, ...), of four lanes together, and of all. NaN is skipped here.
struct Maxima {
  alignas(64) float lane[kLanes];
  alignas(64) float four[kLanes / 4];  // four[l]: lanes l, l + 16, l + 32, l + 48
  float top;
};

inline float larger(float a, float b) { return a > b ? a : b; }

inline void block_maxima(const float* __restrict x, Maxima& maxima) {
  constexpr int kQuarter = kLanes / 4;
#pragma omp simd
  for (int l = 0; l < kQuarter; ++l) {
    float a = -INFINITY, b = -INFINITY, c = -INFINITY, d = -INFINITY;
#pragma GCC unroll 8
    for (int i = 0; i < kBlock; i += kLanes) {
      a = larger(x[i + l], a);
      b = larger(x[i + l + kQuarter], b);
      c = larger(x[i + l + 2 * kQuarter], c);
      d = larger(x[i + l + 3 * kQuarter], d);
    }
    maxima.lane[l] = a;
    maxima.lane[l + kQuarter] = b;
    maxima.lane[l + 2 * kQuarter] = c;
    maxima.lane[l + 3 * kQuarter] = d;
    maxima.four[l] = larger(larger(a, b), larger(c, d));
  }
  float top = maxima.four[0];
  for (int l = 1; l < kQuarter; ++l) top = larger(maxima.four[l], top);
  maxima.top = top;
}

// Adds e^(x - largest) of a block to 32 lanes of sums; NaN if an x is NaN or +inf. The difference comes first: it is
// exact where it matters, whatever the size of the logits, with a fused multiply-add and without.
constexpr int kSums = 32;

inline void exp_sum(const float* __restrict x, float largest, float* __restrict sums) {
  // Hidden from the compiler: knowing the constant, GCC 12 splits the loop body in two and blends them.
  float smallest = kSmallest;
  __asm__("" : "+m"(smallest));
#pragma omp simd
  for (int l = 0; l < kSums; ++l) {
    float sum = sums[l];
    for (int i = 0; i < kBlock; i += kSums) {
      const Exponential e = exp2_parts((x[i + l] - largest) * kLog2E, smallest);
      sum += e.factor * e.power;
    }
    sums[l] = sum;
  }
}

// Elements of a block that may be among the best: only lanes whose maximum is are searched.
void collect(const float* x, int n, int64_t start, const Maxima& maxima, Best& best) {
  for (int l = 0; l < kLanes / 4; ++l) {
    if (!(maxima.four[l] >= best.worst)) continue;
    for (int lane = l; lane < kLanes; lane += kLanes / 4) {
      if (!(maxima.lane[lane] >= best.worst)) continue;
      for (int i = lane; i < n; i += kLanes) {
        if (x[i] >= best.worst) best.insert(x[i], start + i);
      }
    }
  }
}

// The log-sum-exp of one chunk, and its candidates into `best`, which is null where only the sum is wanted. A sum is
// NaN where the chunk holds NaN or +inf, as log_softmax has it.
void scan_chunk(const LogitRows& rows, const ChunkSums& result, int64_t row, int64_t chunk, Best* best) {
  alignas(64) float buffer[kBlock];
  alignas(64) float sums[kSums] = {};
  Maxima maxima;
  const int64_t first = chunk * kChunk;
  const int64_t last = first + kChunk < rows.vocab ? first + kChunk : rows.vocab;
  float top = -INFINITY;  // the largest value so far, which the sums are relative to
  const auto block = [&](int64_t start, int n) {
    const float* x = as_floats(rows.dtype, rows.logits, row * rows.row_stride + start, n, buffer);
    if (n == kBlock) return x;
    if (x != buffer) std::memcpy(buffer, x, n * sizeof(float));
    for (int i = n; i < kBlock; ++i) buffer[i] = -INFINITY;  // changes neither list nor sum
    return static_cast<const float*>(buffer);
  };
  for (int64_t start = first; start < last; start += kBlock) {
    const int n = static_cast<int>(last - start < kBlock ? last - start : kBlock);
    const float* x = block(start, n);
    block_maxima(x, maxima);
    if (maxima.top > top) {
      const float difference = (top - maxima.top) * kLog2E;  // -inf at the first value: what lies before adds nothing
      float factor = difference < kSmallest ? 0.0f : exp2_negative(difference);
#pragma omp simd
      for (int l = 0; l < kSums; ++l) sums[l] *= factor;
      top = maxima.top;
    }
    exp_sum(x, top == -INFINITY ? 0.0f : top, sums);  // all -inf so far: a NaN still shows
    if (best && (maxima.top > best->worst || !best->full())) collect(x, n, start, maxima, *best);
  }
  for (int half = kSums / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
  }
  result.largest[row * result.chunks + chunk] = top;
  result.sum[row * result.chunks + chunk] = sums[0];
  if (sums[0] == sums[0] || !best) return;
  // NaN, which comparisons have passed over so far.
  for (int64_t start = first; start < last; start += kBlock) {
    const int n = static_cast<int>(last - start < kBlock ? last - start : kBlock);
    const float* x = block(start, n);
    for (int i = 0; i < n; ++i) {
      if (x[i] != x[i]) best->insert(x[i], start + i);
    }
  }
}

// A row's log-sum-exp as largest + log_sum, so that neither is rounded to the size of the other. Of a row of -inf both
// are -inf.
struct LogSumExp {
  double largest, log_sum;

  // The log-probability of a logit.
  float operator()(float value) const { return static_cast<float>((value - largest) - log_sum); }
};

LogSumExp merge_chunks(const ChunkSums& parts, int64_t row) {
  const float* tops = parts.largest + row * parts.chunks;
  const float* sums = parts.sum + row * parts.chunks;
  float largest = -INFINITY;
  for (int64_t c = 0; c < parts.chunks; ++c) largest = larger(tops[c], largest);
  double sum = 0.0;
  for (int64_t c = 0; c < parts.chunks; ++c) {
    const double factor = tops[c] == largest ? 1.0 : std::exp(static_cast<double>(tops[c]) - largest);
    sum += sums[c] * factor;  // factor is 0 where all is -inf, but NaN stays
  }
  if (largest == -INFINITY && sum == sum) sum = 0.0;
  return {largest, std::log(sum)};
}

// Tasks begin .. end of all rows' tasks, counted through: scan(row, task of the row, best) each. Rows that lie inside
// are finished here, by finish(row, best); of others the list is kept for merge_row.
template <class Scan, class Finish>
void scan_rows(const Parts& parts, int k, int64_t begin, int64_t end, Scan scan, Finish finish) {
  Best best;
  best.k = k;
  for (int64_t task = begin; task < end;) {
    const int64_t row = task / parts.tasks, row_start = row * parts.tasks, row_end = row_start + parts.tasks;
    const int64_t first = task, last = row_end < end ? row_end : end;
    best.clear();
    for (; task < last; ++task) scan(row, task - row_start, best);
    if (first == row_start && last == row_end) {
      finish(row, best);
    } else {
      parts.there[first] = 1;
      for (int j = 0; j < k; ++j) parts.keys[first * k + j] = best.key[j];
    }
  }
}

// The list of a row that several threads worked on.
Best merge_row(const Parts& parts, int k, int64_t row) {
  Best best;
  best.k = k;
  best.clear();
  for (int64_t task = row * parts.tasks; task < (row + 1) * parts.tasks; ++task) {
    if (!parts.there[task]) continue;
    for (int j = 0; j < k; ++j) best.insert(parts.keys[task * k + j]);
  }
  return best;
}

}  // namespace
}  // namespace pyargs
