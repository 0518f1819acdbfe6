// The kernels of include/pyargs/kernels.h: which code, on how many threads. Baseline only.
#include <memory>
#include <vector>

#include "check.h"
#include "include/pyargs/kernels.h"
#include "kernels/cpu/launch.h"
#include "parallel.h"

namespace pyargs::cpu {
namespace {

// A scan of rows of logits, `rows_of_result` of them for each row of the result.
class Scan {
 public:
  Scan(int64_t batch, int64_t rows_of_result, int64_t vocab, int64_t k)
      : batch_(batch),
        // About 10 us of work: less is not worth waiting for a thread that sleeps.
        grain_(8 * kChunk / (vocab < kChunk ? vocab : kChunk)) {
    sums.chunks = (vocab + kChunk - 1) / kChunk;
    parts.tasks = rows_of_result * sums.chunks;
    const int64_t tasks = batch * parts.tasks;
    // Not initialised: only the rows cut between two threads touch the lists.
    largest_.reset(sums.largest = new float[tasks]);
    sum_.reset(sums.sum = new float[tasks]);
    there_.reset(parts.there = new uint8_t[tasks]());
    keys_.reset(parts.keys = new uint64_t[tasks * k]);
  }

  // scan(begin, end) of tasks on several threads, then merge(row) of the rows that more than one of them worked on.
  template <class ScanTasks, class MergeRow>
  void run(ScanTasks scan, MergeRow merge) {
    in_ranges(batch_ * parts.tasks, grain_, scan);
    for (int64_t row = 0; row < batch_; ++row) {
      bool cut = false;
      for (int64_t task = row * parts.tasks; task < (row + 1) * parts.tasks; ++task) cut = cut || parts.there[task];
      if (cut) merge(row);
    }
  }

  ChunkSums sums;
  Parts parts;

 private:
  int64_t batch_, grain_;
  std::unique_ptr<float[]> largest_, sum_;
  std::unique_ptr<uint8_t[]> there_;
  std::unique_ptr<uint64_t[]> keys_;
};

void check_logits(const LogitRows& rows, int64_t k) {
  check(k >= 1 && k <= kMaxTopK, "k must be 1 to 64");
  check(k <= rows.vocab, "k is larger than the vocabulary");
  check(rows.vocab < INT32_MAX, "the vocabulary must have fewer than 2^31 - 1 entries");
}

}  // namespace

void topk_logprobs(const LogitRows& logits, int64_t batch, int64_t k, float* logprobs, int64_t* ids, float* logsumexp) {
  check_logits(logits, k);
  if (batch <= 0) return;
  Scan scan(batch, 1, logits.vocab, k);
  const TopkRows rows{logits, static_cast<int>(k), logprobs, ids, logsumexp, scan.sums, scan.parts};
  scan.run([&rows](int64_t begin, int64_t end) { PYARGS_DISPATCH(topk_scan, rows, begin, end); },
           [&rows](int64_t row) { PYARGS_DISPATCH(topk_merge, rows, row); });
}

void tokenwise_select(const TokenwiseRows& rows, int64_t batch) {
  check_logits(rows.policy, rows.k);
  check(rows.rewards.vocab == rows.policy.vocab, "logits and reward_logits must have one shape");
  if (batch <= 0) return;
  Scan memory(batch, 2, rows.policy.vocab, rows.k);
  TokenwiseScan scan{rows, memory.sums, memory.sums, memory.parts};
  scan.rewards.largest += batch * memory.sums.chunks;
  scan.rewards.sum += batch * memory.sums.chunks;
  memory.run([&scan](int64_t begin, int64_t end) { PYARGS_DISPATCH(tokenwise_scan, scan, begin, end); },
             [&scan](int64_t row) { PYARGS_DISPATCH(tokenwise_merge, scan, row); });
}

void score_select(const ScoreRows& rows, int64_t batch) {
  check(rows.k >= 1 && rows.hidden >= 1, "features must have k >= 1 and H >= 1");
  check(rows.k < INT32_MAX, "k must be less than 2^31 - 1");
  check(!rows.state.step || rows.k <= kMaxTopK, "k must be at most 64");
  const int64_t users = std::max({rows.weight_rows, rows.bias_rows, rows.bank_rows});
  for (const int64_t several : {rows.weight_rows, rows.bias_rows, rows.bank_rows}) {
    check(several <= 1 || several == users, "weight, bias and bank must have as many rows, or a single one");
  }
  const int64_t row_work = rows.k * rows.hidden * (rows.activation == Activation::kGelu ? 8 : 1);
  const int64_t grain = 1 + 65536 / row_work;  // about 10 us: less is not worth waiting for a thread that sleeps
  in_ranges(batch, grain, [&rows](int64_t begin, int64_t end) { PYARGS_DISPATCH(score_select, rows, begin, end); });
}

void user_mlp(const UserMlpRows& rows, int64_t batch) {
  check(rows.k >= 1 && rows.dim >= 1, "hidden must be [B, k, D], k and D >= 1");
  check(rows.users >= 1 && rows.units >= 1, "bank must be [U, H, D], U and H >= 1");
  const int64_t blocks = batch * ((rows.units + kMlpUnits - 1) / kMlpUnits);
  const int64_t grain = 1 + (1 << 18) / (rows.k * rows.dim * kMlpUnits);  // less is not worth waking a thread
  in_ranges(blocks, grain, [&rows](int64_t begin, int64_t end) { PYARGS_DISPATCH(user_mlp, rows, begin, end); });
}

void commit(const CommitRows& given, int64_t capacity) {
  check(given.count >= 1 && given.count <= kMaxCommitted, "1 to 256 tensors of states");
  // Copies: slot and length may be views of the states themselves.
  const std::vector<int64_t> slots(given.slot, given.slot + given.batch);
  const std::vector<int64_t> lengths(given.length, given.length + given.batch);
  for (int64_t b = 0; b < given.batch; ++b) {
    if (slots[b] < 0) continue;
    check(lengths[b] >= 0 && lengths[b] < capacity, "a length must be a place of the states");
    check(slots[b] < capacity - lengths[b], "a slot lies behind the states");
  }
  CommitRows rows = given;
  rows.slot = slots.data();
  rows.length = lengths.data();
  PYARGS_DISPATCH(commit, rows);
}

}  // namespace pyargs::cpu
