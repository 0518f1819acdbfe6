// Functions of the .cpp files, for csrc/ops: PYARGS_DISPATCH calls the one of a CPU capability. No torch: what they are
// told is in ../rows.h and here.
#pragma once

#include "../rows.h"
#include "capability.h"

namespace pyargs {

constexpr int kChunk = 8192;  // of a row of logits; see topk.h

// Sums of chunks, relative to the chunk's largest value.
struct ChunkSums {
  int64_t chunks;  // of a row
  float* largest;  // [B, chunks]; -inf where all values are
  float* sum;      // [B, chunks]: of e^(x - largest)
};

// The lists of threads that got only a part of a row, each at its first task; see scan_rows.
struct Parts {
  int64_t tasks;   // of a row
  uint8_t* there;  // [B, tasks]
  uint64_t* keys;  // [B, tasks, k]
};

struct TopkRows {
  LogitRows logits;
  int k;
  float* logprobs;   // [B, k]
  int64_t* ids;      // [B, k]
  float* logsumexp;  // [B]
  ChunkSums sums;
  Parts parts;
};

struct TokenwiseScan {
  TokenwiseRows rows;
  ChunkSums policy, rewards;
  Parts parts;
};

constexpr int kMlpUnits = 4;  // of a block of user_mlp

#define PYARGS_DECLARE(capability)                                            \
  namespace capability {                                                      \
  /* Rows begin .. end. */                                                    \
  void score_select(const ScoreRows& rows, int64_t begin, int64_t end);       \
  /* Tasks begin .. end of all rows' tasks; then a row that was cut. */       \
  void topk_scan(const TopkRows& rows, int64_t begin, int64_t end);           \
  void topk_merge(const TopkRows& rows, int64_t row);                         \
  void tokenwise_scan(const TokenwiseScan& scan, int64_t begin, int64_t end); \
  void tokenwise_merge(const TokenwiseScan& scan, int64_t row);               \
  /* Blocks begin .. end of all rows' blocks of kMlpUnits units. */           \
  void user_mlp(const UserMlpRows& rows, int64_t begin, int64_t end);         \
  /* All rows, of which none has a slot behind the states. */                 \
  void commit(const CommitRows& rows);                                        \
  }
PYARGS_DECLARE(baseline)
PYARGS_DECLARE(avx2)
PYARGS_DECLARE(avx512)
#undef PYARGS_DECLARE

}  // namespace pyargs
