// topk_logprobs: the k most probable tokens of every row with their log-probabilities, and the row's log-sum-exp, in
// one pass over the logits. See pyargs/ops/topk_logprobs.py for the contract, topk.h for the way.

#include "topk.h"

namespace pyargs {
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
}  // namespace pyargs
