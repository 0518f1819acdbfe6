// topk_logprobs: the k most probable tokens of every row with their log-probabilities, and the row's log-sum-exp, in
// one pass over the logits. See pyargs/ops/topk_logprobs.py for the contract, topk.h for the way.

#include "topk.h"

namespace pyargs {

struct TopkRows {
  LogitRows logits;
  int k;
  float* logprobs;   // [B, k]
  int64_t* ids;      // [B, k]
  float* logsumexp;  // [B]
  ChunkSums sums;
  Parts parts;
};

namespace PYARGS_CPU {
namespace {

void write_row(const TopkRows& rows, int64_t row, const Best& best) {
  const LogSumExp total = merge_chunks(rows.sums, row);
  // As torch has it: a row of -inf has logsumexp -inf, one with +inf has +inf unless it holds NaN, and the log-probs
  // of both are NaN.
  const float best_value = float_from_bits(key_bits(best.key[0]));
  rows.logsumexp[row] = best_value == INFINITY ? INFINITY : static_cast<float>(total.largest + total.log_sum);
  for (int j = 0; j < best.k; ++j) {
    rows.ids[row * best.k + j] = key_index(best.key[j]);
    rows.logprobs[row * best.k + j] = total(float_from_bits(key_bits(best.key[j])));
  }
}

}  // namespace

void topk_scan(const TopkRows& rows, int64_t begin, int64_t end) {
  scan_rows(
      rows.parts, rows.k, begin, end,
      [&rows](int64_t row, int64_t chunk, Best& best) { scan_chunk(rows.logits, rows.sums, row, chunk, &best); },
      [&rows](int64_t row, const Best& best) { write_row(rows, row, best); });
}

void topk_merge(const TopkRows& rows, int64_t row) { write_row(rows, row, merge_row(rows.parts, rows.k, row)); }

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

#ifdef PYARGS_HOST  // the op: schema and checks

#include "../../ops/tensor.h"

#ifdef PYARGS_CUDA_ARCHS
#include "../cuda/launch.h"
#endif

namespace pyargs {
namespace {

using Results = std::tuple<StableIValue, StableIValue, StableIValue>;

// The handle is ours: boxed arguments come owned, and results are given away.
Results topk_logprobs_cpu(AtenTensorHandle handle, int64_t k) {
  Array logits(handle);
  TopkRows rows{};
  rows.logits = logit_rows(logits, k);
  rows.k = static_cast<int>(k);
  const int64_t batch = logits.size(0);
  Result logprobs({batch, k}, aoti_torch_dtype_float32(), logits);
  Result ids({batch, k}, aoti_torch_dtype_int64(), logits);
  Result logsumexp({batch}, aoti_torch_dtype_float32(), logits);
  rows.logprobs = logprobs.data<float>();
  rows.ids = ids.data<int64_t>();
  rows.logsumexp = logsumexp.data<float>();
  Scan scan(batch, 1, rows.logits.vocab, k);
  rows.sums = scan.sums;
  rows.parts = scan.parts;
  scan.run([&rows](int64_t begin, int64_t end) { PYARGS_DISPATCH(topk_scan, rows, begin, end); },
           [&rows](int64_t row) { PYARGS_DISPATCH(topk_merge, rows, row); });
  return {logprobs.release(), ids.release(), logsumexp.release()};
}

#ifdef PYARGS_CUDA_ARCHS
Results topk_logprobs_cuda(AtenTensorHandle handle, int64_t k) {
  Array logits(handle);
  const LogitRows rows = logit_rows(logits, k);
  const int64_t batch = logits.size(0);
  Result logprobs({batch, k}, aoti_torch_dtype_float32(), logits);
  Result ids({batch, k}, aoti_torch_dtype_int64(), logits);
  Result logsumexp({batch}, aoti_torch_dtype_float32(), logits);
  if (batch > 0) {
    const int64_t bytes = static_cast<int64_t>(cuda::topk_workspace_bytes(batch, rows.vocab));
    Result workspace({bytes}, aoti_torch_dtype_uint8(), logits);
    check_launch(cuda::topk_logprobs(rows.logits, rows.dtype, batch, rows.vocab, rows.row_stride, static_cast<int>(k),
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
