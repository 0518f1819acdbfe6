// Rows of logits that an op scans: the checks of them, and the memory and threads of a scan on the CPU.
#pragma once

#include <memory>

#include "../kernels/cpu/launch.h"
#include "tensor.h"

namespace pyargs {
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
    torch::stable::parallel_for(0, batch_ * parts.tasks, grain_, scan);
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

// Logits [B, V] of which k are wanted, checked; a dense copy where the elements of a row are not side by side.
LogitRows logit_rows(Array& logits, int64_t k) {
  check(logits.dim() == 2, "logits must be [B, V]");
  const Dtype dtype = logits.float_dtype("logits must be float32, bfloat16 or float16");
  check(k >= 1 && k <= kMaxTopK, "k must be 1 to 64");
  check(k <= logits.size(1), "k is larger than the vocabulary");
  check(logits.size(1) < INT32_MAX, "the vocabulary must have fewer than 2^31 - 1 entries");
  logits.require_dense_rows();
  return {logits.data(), dtype, logits.size(1), logits.stride(0)};
}

}  // namespace
}  // namespace pyargs
