// tokenwise_select: from the logits of a policy and of a model whose log-probs are the rewards to the next token, in
// one pass over both. See pyargs/ops/tokenwise_select.py for the contract, topk.h for the scan.
//
// A row's tasks are the chunks of its policy logits, then those of its reward logits, of which only the sum is wanted.

#include "../choice.h"
#include "topk.h"

namespace pyargs {
namespace PYARGS_CPU {
namespace {

void select_row(const TokenwiseScan& scan, int64_t row, const Best& best) {
  const TokenwiseRows& rows = scan.rows;
  if (rows.finished[row]) return pad_row(rows, row);
  const LogSumExp policy = merge_chunks(scan.policy, row), rewards = merge_chunks(scan.rewards, row);
  float logprobs[kMaxTopK];
  int64_t ids[kMaxTopK];
  float own[kMaxTopK];
  double chance[kMaxTopK];
  float* reward = rows.reward ? rows.reward + row * rows.k : own;
  for (int j = 0; j < best.k; ++j) {
    ids[j] = key_index(best.key[j]);
    logprobs[j] = policy(float_from_bits(key_bits(best.key[j])));
  }
  const int count = count_of(rows, row, logprobs, chance);
  for (int j = 0; j < best.k; ++j) {
    float buffer;
    const int64_t at = row * rows.rewards.row_stride + ids[j];
    reward[j] = j < count ? rewards(*as_floats(rows.rewards.dtype, rows.rewards.logits, at, 1, &buffer)) : 0.0f;
  }
  const Leader leader = leader_of(rows, row, count, logprobs, reward);
  write_choice(rows, row, choose(rows, row, count, logprobs, reward, leader), ids, count, reward);
}

}  // namespace

void tokenwise_scan(const TokenwiseScan& scan, int64_t begin, int64_t end) {
  const int64_t chunks = scan.policy.chunks;
  scan_rows(
      scan.parts, static_cast<int>(scan.rows.k), begin, end,
      [&scan, chunks](int64_t row, int64_t task, Best& best) {
        if (scan.rows.finished[row]) return;
        if (task < chunks) {
          scan_chunk(scan.rows.policy, scan.policy, row, task, &best);
        } else {
          scan_chunk(scan.rows.rewards, scan.rewards, row, task - chunks, nullptr);
        }
      },
      [&scan](int64_t row, const Best& best) { select_row(scan, row, best); });
}

void tokenwise_merge(const TokenwiseScan& scan, int64_t row) {
  select_row(scan, row, merge_row(scan.parts, static_cast<int>(scan.rows.k), row));
}

}  // namespace PYARGS_CPU
}  // namespace pyargs
