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
  float* logprobs;      // [batch, k]
  int64_t* ids;         // [batch, k]
  float* logsumexp;     // [batch]
  int64_t chunks;       // per row
  float* chunk_offset;  // [batch, chunks]: 2^offset = e^-(largest value); +inf where all values are -inf
  float* chunk_sum;     // [batch, chunks]: of 2^(x log2(e) + offset); NaN where the chunk holds NaN or +inf
  uint8_t* has_part;    // [batch, chunks]: a thread that got only a part of a row leaves its list at its first chunk
  uint64_t* part_keys;  // [batch, chunks, k]
};

constexpr int kChunk = 8192, kBlock = 512, kLanes = 64;

namespace PYARGS_CPU {
namespace {

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

// Adds 2^(x log2(e) + offset) of a block to 32 lanes of sums; NaN if an x is NaN or the offset infinite.
constexpr int kSums = 32;

inline void exp_sum(const float* __restrict x, float offset, float* __restrict sums) {
  // Hidden from the compiler: knowing the constant, GCC 12 splits the loop body in two and blends them.
  float smallest = kSmallest;
  __asm__("" : "+m"(smallest));
#pragma omp simd
  for (int l = 0; l < kSums; ++l) {
    float sum = sums[l];
    for (int i = 0; i < kBlock; i += kSums) {
      const Exponential e = exp2_parts(x[i + l] * kLog2E + offset, smallest);
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

// The log-sum-exp of one chunk, and its candidates into `best`.
void scan_chunk(const TopkRows& rows, int64_t row, int64_t chunk, Best& best) {
  alignas(64) float buffer[kBlock];
  alignas(64) float sums[kSums] = {};
  Maxima maxima;
  const int64_t first = chunk * kChunk;
  const int64_t last = first + kChunk < rows.vocab ? first + kChunk : rows.vocab;
  // Sums are relative to the largest value so far: 2^offset = e^-top. The rounding of the offset is no error, for the
  // rounded one is what the sum is relative to.
  float top = -INFINITY, offset = 0.0f;
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
      const float next = -maxima.top * kLog2E;
      const float factor = top == -INFINITY ? 1.0f : exp2_negative(next - offset);
#pragma omp simd
      for (int l = 0; l < kSums; ++l) sums[l] *= factor;
      top = maxima.top;
      offset = next;
    }
    exp_sum(x, offset, sums);  // all -inf so far: adds next to nothing, and a NaN still shows
    if (maxima.top > best.worst || !best.full()) collect(x, n, start, maxima, best);
  }
  for (int half = kSums / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
  }
  if (sums[0] != sums[0]) {  // NaN or +inf somewhere; comparisons have passed over NaN so far
    for (int64_t start = first; start < last; start += kBlock) {
      const int n = static_cast<int>(last - start < kBlock ? last - start : kBlock);
      const float* x = block(start, n);
      for (int i = 0; i < n; ++i) {
        if (x[i] != x[i]) best.insert(x[i], start + i);
      }
    }
  }
  rows.chunk_offset[row * rows.chunks + chunk] = top == -INFINITY ? INFINITY : offset;
  rows.chunk_sum[row * rows.chunks + chunk] = sums[0];
}

void write_row(const TopkRows& rows, int64_t row, const Best& best) {
  const float* offsets = rows.chunk_offset + row * rows.chunks;
  const float* sums = rows.chunk_sum + row * rows.chunks;
  float offset = INFINITY;  // of the chunk with the largest value
  for (int64_t c = 0; c < rows.chunks; ++c) offset = offsets[c] < offset ? offsets[c] : offset;
  double sum = 0.0;
  for (int64_t c = 0; c < rows.chunks; ++c) {
    const double factor = offsets[c] == offset ? 1.0 : std::exp2(static_cast<double>(offset) - offsets[c]);
    sum += sums[c] * factor;  // factor is 0 where all is -inf, but NaN stays
  }
  if (offset == INFINITY && sum == sum) sum = 0.0;
  // As torch has it: a row of -inf has logsumexp -inf, one with +inf has +inf unless it holds NaN, and the log-probs
  // of both are NaN.
  const double reference = -static_cast<double>(offset) / kLog2E, log_sum = std::log(sum);
  const float best_value = float_from_bits(key_bits(best.key[0]));
  rows.logsumexp[row] = best_value == INFINITY ? INFINITY : static_cast<float>(reference + log_sum);
  for (int j = 0; j < best.k; ++j) {
    const double value = float_from_bits(key_bits(best.key[j]));
    rows.ids[row * best.k + j] = key_index(best.key[j]);
    rows.logprobs[row * best.k + j] = static_cast<float>((value - reference) - log_sum);
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
    best.clear();
    for (; task < last; ++task) scan_chunk(rows, row, task - row_start, best);
    if (first == row_start && last == row_end) {
      write_row(rows, row, best);
    } else {
      rows.has_part[first] = 1;
      for (int j = 0; j < best.k; ++j) rows.part_keys[first * best.k + j] = best.key[j];
    }
  }
}

// A row that several threads worked on.
void topk_merge(const TopkRows& rows, int64_t row) {
  Best best;
  best.k = rows.k;
  best.clear();
  for (int64_t task = row * rows.chunks; task < (row + 1) * rows.chunks; ++task) {
    if (!rows.has_part[task]) continue;
    for (int j = 0; j < best.k; ++j) best.insert(rows.part_keys[task * best.k + j]);
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
#include "cuda/launch.h"
#endif

namespace pyargs {
namespace {

using Results = std::tuple<StableIValue, StableIValue, StableIValue>;

Dtype check_logits(Array& logits, int64_t k) {
  check(logits.dim() == 2, "logits must be [B, V]");
  const Dtype dtype = logits.float_dtype("logits must be float32, bfloat16 or float16");
  check(k >= 1 && k <= kMaxTopK, "k must be 1 to 64");
  check(k <= logits.size(1), "k is larger than the vocabulary");
  check(logits.size(1) < INT32_MAX, "the vocabulary must have fewer than 2^31 - 1 entries");
  logits.require_dense_rows();
  return dtype;
}

// The handle is ours: boxed arguments come owned, and results are given away.
Results topk_logprobs_cpu(AtenTensorHandle handle, int64_t k) {
  Array logits(handle);
  TopkRows rows{};
  rows.dtype = check_logits(logits, k);
  rows.batch = logits.size(0);
  rows.vocab = logits.size(1);
  rows.row_stride = logits.stride(0);
  rows.k = static_cast<int>(k);
  rows.logits = logits.data();
  Result logprobs({rows.batch, k}, aoti_torch_dtype_float32(), logits);
  Result ids({rows.batch, k}, aoti_torch_dtype_int64(), logits);
  Result logsumexp({rows.batch}, aoti_torch_dtype_float32(), logits);
  rows.logprobs = logprobs.data<float>();
  rows.ids = ids.data<int64_t>();
  rows.logsumexp = logsumexp.data<float>();
  rows.chunks = (rows.vocab + kChunk - 1) / kChunk;
  const int64_t tasks = rows.batch * rows.chunks;
  // Not initialised: only the rows cut between two threads touch the lists.
  std::unique_ptr<float[]> sums(new float[2 * tasks]);
  std::unique_ptr<uint8_t[]> has_part(new uint8_t[tasks]());
  std::unique_ptr<uint64_t[]> part_keys(new uint64_t[tasks * k]);
  rows.chunk_offset = sums.get();
  rows.chunk_sum = sums.get() + tasks;
  rows.has_part = has_part.get();
  rows.part_keys = part_keys.get();

  // About 10 us of work: less is not worth waiting for a thread that sleeps.
  const int64_t grain = 8 * kChunk / (rows.vocab < kChunk ? rows.vocab : kChunk);
  torch::stable::parallel_for(0, tasks, grain,
                              [&rows](int64_t begin, int64_t end) { PYARGS_DISPATCH(topk_scan, rows, begin, end); });
  for (int64_t row = 0; row < rows.batch; ++row) {
    bool parts = false;
    for (int64_t task = row * rows.chunks; task < (row + 1) * rows.chunks; ++task) parts = parts || has_part[task];
    if (parts) PYARGS_DISPATCH(topk_merge, rows, row);
  }
  return {logprobs.release(), ids.release(), logsumexp.release()};
}

#ifdef PYARGS_CUDA_ARCHS
Results topk_logprobs_cuda(AtenTensorHandle handle, int64_t k) {
  Array logits(handle);
  const Dtype dtype = check_logits(logits, k);
  const int64_t batch = logits.size(0), vocab = logits.size(1);
  Result logprobs({batch, k}, aoti_torch_dtype_float32(), logits);
  Result ids({batch, k}, aoti_torch_dtype_int64(), logits);
  Result logsumexp({batch}, aoti_torch_dtype_float32(), logits);
  if (batch > 0) {
    const int64_t bytes = static_cast<int64_t>(cuda::topk_workspace_bytes(batch, vocab));
    Result workspace({bytes}, aoti_torch_dtype_uint8(), logits);
    check_launch(cuda::topk_logprobs(logits.data(), dtype, batch, vocab, logits.stride(0), static_cast<int>(k),
                                     logprobs.data<float>(), ids.data<int64_t>(), logsumexp.data<float>(),
                                     workspace.data(), logits.device_index(), cuda_stream(logits)));
  }
  return {logprobs.release(), ids.release(), logsumexp.release()};
}
#endif

}  // namespace
}  // namespace pyargs

STABLE_TORCH_LIBRARY_FRAGMENT(pyargs, m) {
  m.def("topk_logprobs(Tensor logits, SymInt k) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyargs, CPU, m) { m.impl("topk_logprobs", TORCH_BOX(&pyargs::topk_logprobs_cpu)); }

#ifdef PYARGS_CUDA_ARCHS
STABLE_TORCH_LIBRARY_IMPL(pyargs, CUDA, m) { m.impl("topk_logprobs", TORCH_BOX(&pyargs::topk_logprobs_cuda)); }
#endif

#endif  // PYARGS_HOST
