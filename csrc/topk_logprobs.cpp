// topk_logprobs: the k most probable tokens of every row with their log-probabilities, and the row's log-sum-exp, in
// one pass over the logits. See pyargs/ops/topk_logprobs.py for the contract.
//
// A row is cut into chunks of 8192 and a chunk into blocks of 512. Per block: 64 lane maxima; if none of them beats
// the k-th best so far, the block holds no candidate; otherwise only the lanes that do are searched. Then the block's
// sum of exp(x - reference) while it is still in the first-level cache. Log-sum-exps are kept per chunk and merged in
// order of the chunks, so a row's result is the same for any batch and any number of threads; the k best are the same
// anyway, because (value, lower id) is a total order.

#include <cmath>

#include "cpu.h"

namespace pyargs {

struct TopkRows {
  const void* logits;
  Dtype dtype;
  int64_t batch, vocab, row_stride;
  int k;
  float* logprobs;     // [batch, k]
  int64_t* ids;        // [batch, k]
  float* logsumexp;    // [batch]
  int64_t chunks;      // per row
  float* chunk_max;    // [batch, chunks]
  float* chunk_sum;    // [batch, chunks]: sum of exp(x - chunk_max); NaN where the chunk holds NaN or +inf
  uint8_t* has_part;   // [batch, chunks]: a thread that got only a part of a row leaves its list at its first chunk
  float* part_values;  // [batch, chunks, k]
  int32_t* part_ids;   // [batch, chunks, k]
};

constexpr int kChunk = 8192, kBlock = 512, kLanes = 64;
constexpr int32_t kNoId = INT32_MAX;

namespace PYARGS_CPU {
namespace {

struct Best {
  float value[kMaxTopK];
  int32_t id[kMaxTopK];
  int k;
};

void clear(Best& best) {
  for (int j = 0; j < best.k; ++j) {
    best.value[j] = -INFINITY;
    best.id[j] = kNoId;
  }
}

// NaN above everything, then the value, then the lower id: torch.topk's order, with its ties decided.
inline bool better(float a, int32_t a_id, float b, int32_t b_id) {
  if (a > b) return true;
  if (a < b) return false;
  const bool a_nan = a != a, b_nan = b != b;
  if (a_nan != b_nan) return a_nan;
  return a_id < b_id;
}

inline void insert(Best& best, float value, int32_t id) {
  int j = best.k - 1;
  if (!better(value, id, best.value[j], best.id[j])) return;
  for (; j > 0 && better(value, id, best.value[j - 1], best.id[j - 1]); --j) {
    best.value[j] = best.value[j - 1];
    best.id[j] = best.id[j - 1];
  }
  best.value[j] = value;
  best.id[j] = id;
}

// Maximum of each lane (elements l, l + 64, ...), and of all. NaN is skipped here.
inline float lane_maxima(const float* __restrict x, float* __restrict lanes) {
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) lanes[l] = x[l];
  for (int i = kLanes; i < kBlock; i += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) lanes[l] = x[i + l] > lanes[l] ? x[i + l] : lanes[l];
  }
  float half[16];
#pragma omp simd
  for (int l = 0; l < 16; ++l) {
    const float a = lanes[l] > lanes[l + 16] ? lanes[l] : lanes[l + 16];
    const float b = lanes[l + 32] > lanes[l + 48] ? lanes[l + 32] : lanes[l + 48];
    half[l] = a > b ? a : b;
  }
  float top = half[0];
  for (int l = 1; l < 16; ++l) top = half[l] > top ? half[l] : top;
  return top;
}

struct Sum {
  float sum;    // of exp(x - reference)
  float probe;  // NaN exactly if an x was NaN, or the reference infinite
};

inline Sum exp_sum(const float* __restrict x, float reference) {
  float sum = 0.0f, probe = 0.0f;
#pragma omp simd reduction(+ : sum, probe)
  for (int i = 0; i < kBlock; ++i) {
    const float d = x[i] - reference;
    sum += exp_negative(d);
    probe += d < -86.0f ? 0.0f : d;
  }
  return {sum, probe};
}

// The log-sum-exp of one chunk, and its candidates into `best`.
void scan_chunk(const TopkRows& rows, int64_t row, int64_t chunk, Best& best) {
  alignas(64) float buffer[kBlock];
  alignas(64) float lanes[kLanes];
  const int64_t first = chunk * kChunk;
  const int64_t last = first + kChunk < rows.vocab ? first + kChunk : rows.vocab;
  float reference = -INFINITY, sum = 0.0f;
  bool bad = false;
  for (int64_t start = first; start < last; start += kBlock) {
    const int n = static_cast<int>(last - start < kBlock ? last - start : kBlock);
    const float* x = as_floats(rows.dtype, rows.logits, row * rows.row_stride + start, n, buffer);
    if (n < kBlock) {  // pad the last block with what changes neither list nor sum
      if (x != buffer) std::memcpy(buffer, x, n * sizeof(float));
      for (int i = n; i < kBlock; ++i) buffer[i] = -INFINITY;
      x = buffer;
    }
    const float top = lane_maxima(x, lanes);
    if (top > reference) {
      sum = reference == -INFINITY ? 0.0f : sum * exp_negative(reference - top);
      reference = top;
    }
    // All -inf so far: any finite reference makes every term vanish.
    const Sum block = exp_sum(x, reference == -INFINITY ? 0.0f : reference);
    if (reference != -INFINITY) sum += block.sum;
    const float worst = best.value[best.k - 1];
    if (block.probe != block.probe) {
      bad = true;
      for (int i = 0; i < n; ++i) insert(best, x[i], static_cast<int32_t>(start + i));
    } else if (top > worst || best.id[best.k - 1] == kNoId) {
      for (int l = 0; l < kLanes; ++l) {
        if (!(lanes[l] >= best.value[best.k - 1])) continue;
        for (int i = l; i < n; i += kLanes) {
          if (x[i] >= best.value[best.k - 1]) insert(best, x[i], static_cast<int32_t>(start + i));
        }
      }
    }
  }
  rows.chunk_max[row * rows.chunks + chunk] = reference;
  rows.chunk_sum[row * rows.chunks + chunk] = bad ? NAN : sum;
}

void write_row(const TopkRows& rows, int64_t row, const Best& best) {
  const float* maxima = rows.chunk_max + row * rows.chunks;
  const float* sums = rows.chunk_sum + row * rows.chunks;
  float top = -INFINITY;
  for (int64_t c = 0; c < rows.chunks; ++c) top = maxima[c] > top ? maxima[c] : top;
  double sum = 0.0;
  for (int64_t c = 0; c < rows.chunks; ++c) {
    if (maxima[c] == top) {
      sum += sums[c];
    } else if (maxima[c] != -INFINITY || sums[c] != sums[c]) {
      sum += sums[c] * std::exp(static_cast<double>(maxima[c]) - top);
    }
  }
  // A row of -inf has logsumexp -inf and, like log_softmax, NaN log-probs; NaN or +inf inside makes both NaN, except
  // that torch.logsumexp of +inf is +inf.
  const double log_sum = std::log(sum);
  const bool plus_inf = top == INFINITY;
  bool nan = false;
  for (int j = 0; j < best.k; ++j) nan = nan || best.value[j] != best.value[j];
  rows.logsumexp[row] = plus_inf && !nan ? INFINITY : static_cast<float>(top + log_sum);
  for (int j = 0; j < best.k; ++j) {
    rows.ids[row * best.k + j] = best.id[j];
    rows.logprobs[row * best.k + j] = static_cast<float>((static_cast<double>(best.value[j]) - top) - log_sum);
  }
}

}  // namespace

// Chunks begin .. end of all rows' chunks, counted through. Rows that lie inside are finished here.
void topk_scan(const TopkRows& rows, int64_t begin, int64_t end) {
  Best best;
  best.k = rows.k;
  for (int64_t task = begin; task < end;) {
    const int64_t row = task / rows.chunks, row_start = row * rows.chunks, row_end = row_start + rows.chunks;
    const int64_t first = task, last = row_end < end ? row_end : end;
    clear(best);
    for (; task < last; ++task) scan_chunk(rows, row, task - row_start, best);
    if (first == row_start && last == row_end) {
      write_row(rows, row, best);
    } else {
      rows.has_part[first] = 1;
      for (int j = 0; j < best.k; ++j) {
        rows.part_values[first * best.k + j] = best.value[j];
        rows.part_ids[first * best.k + j] = best.id[j];
      }
    }
  }
}

// A row that several threads worked on.
void topk_merge(const TopkRows& rows, int64_t row) {
  Best best;
  best.k = rows.k;
  clear(best);
  for (int64_t task = row * rows.chunks; task < (row + 1) * rows.chunks; ++task) {
    if (!rows.has_part[task]) continue;
    for (int j = 0; j < best.k; ++j) {
      const int32_t id = rows.part_ids[task * best.k + j];
      if (id != kNoId) insert(best, rows.part_values[task * best.k + j], id);
    }
  }
  write_row(rows, row, best);
}

}  // namespace PYARGS_CPU

#ifdef PYARGS_X86
namespace avx2 {
void topk_scan(const TopkRows&, int64_t, int64_t);
void topk_merge(const TopkRows&, int64_t);
}  // namespace avx2
namespace avx512 {
void topk_scan(const TopkRows&, int64_t, int64_t);
void topk_merge(const TopkRows&, int64_t);
}  // namespace avx512
#endif

}  // namespace pyargs

#ifdef PYARGS_HOST  // the op: schema, checks, threads

#include <memory>

#include "tensor.h"

#ifdef PYARGS_CUDA_ARCHS
#include "cuda/topk_logprobs.h"
#endif

namespace pyargs {
namespace {

using Result = std::tuple<Tensor, Tensor, Tensor>;

Dtype check_logits(const Tensor& logits, int64_t k) {
  check(logits.dim() == 2, "logits must be [B, V]");
  const Dtype dtype = float_dtype(logits, "logits must be float32, bfloat16 or float16");
  const int64_t vocab = logits.size(1);
  check(k >= 1 && k <= kMaxTopK, "k must be 1 to 64");
  check(k <= vocab, "k is larger than the vocabulary");
  check(vocab < INT32_MAX, "the vocabulary must have fewer than 2^31 - 1 entries");
  return dtype;
}

Result new_result(const Tensor& logits, int64_t batch, int64_t k) {
  return {new_tensor<2>({batch, k}, aoti_torch_dtype_float32(), logits),
          new_tensor<2>({batch, k}, aoti_torch_dtype_int64(), logits),
          new_tensor<1>({batch}, aoti_torch_dtype_float32(), logits)};
}

Result topk_logprobs_cpu(const Tensor& given, int64_t k) {
  TopkRows rows{};
  rows.dtype = check_logits(given, k);
  const Tensor logits = with_dense_rows(given);
  rows.batch = logits.size(0);
  rows.vocab = logits.size(1);
  rows.k = static_cast<int>(k);
  Result result = new_result(logits, rows.batch, k);
  if (rows.batch == 0) return result;
  rows.logits = logits.data_ptr();
  rows.row_stride = logits.stride(0);
  rows.logprobs = static_cast<float*>(std::get<0>(result).data_ptr());
  rows.ids = static_cast<int64_t*>(std::get<1>(result).data_ptr());
  rows.logsumexp = static_cast<float*>(std::get<2>(result).data_ptr());
  rows.chunks = (rows.vocab + kChunk - 1) / kChunk;
  const int64_t tasks = rows.batch * rows.chunks;
  // Not initialised: only the rows cut between two threads touch the lists.
  std::unique_ptr<float[]> sums(new float[2 * tasks]);
  std::unique_ptr<uint8_t[]> has_part(new uint8_t[tasks]());
  std::unique_ptr<float[]> part_values(new float[tasks * k]);
  std::unique_ptr<int32_t[]> part_ids(new int32_t[tasks * k]);
  rows.chunk_max = sums.get();
  rows.chunk_sum = sums.get() + tasks;
  rows.has_part = has_part.get();
  rows.part_values = part_values.get();
  rows.part_ids = part_ids.get();

  const int64_t grain = 2 * kChunk / (rows.vocab < kChunk ? rows.vocab : kChunk);  // about 3 us of work
  torch::stable::parallel_for(0, tasks, grain,
                              [&rows](int64_t begin, int64_t end) { PYARGS_DISPATCH(topk_scan, rows, begin, end); });
  for (int64_t row = 0; row < rows.batch; ++row) {
    bool parts = false;
    for (int64_t task = row * rows.chunks; task < (row + 1) * rows.chunks; ++task) parts = parts || has_part[task];
    if (parts) PYARGS_DISPATCH(topk_merge, rows, row);
  }
  return result;
}

}  // namespace
}  // namespace pyargs

STABLE_TORCH_LIBRARY_FRAGMENT(pyargs, m) {
  m.def("topk_logprobs(Tensor logits, SymInt k) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyargs, CPU, m) { m.impl("topk_logprobs", TORCH_BOX(&pyargs::topk_logprobs_cpu)); }

#endif  // PYARGS_HOST
