// Rows of logits that an op scans: the checks of them.
#pragma once

#include "../kernels/rows.h"
#include "tensor.h"

namespace pyargs {
namespace {

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
