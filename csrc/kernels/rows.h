// What the kernels of an op are told, on the CPU and on CUDA: pointers, sizes, strides in elements.
#pragma once

#include "common.h"

namespace pyargs {

// CUDA only.
struct BranchRows {
  const void *query, *key, *value;  // [B, heads * groups, k, dim], [B, heads, places, dim] twice
  Dtype dtype;
  int64_t query_stride_b, query_stride_h, query_stride_k;
  int64_t key_stride_b, key_stride_h, key_stride_t, value_stride_b, value_stride_h, value_stride_t;
  int64_t batch;
  int heads, groups, k, places, dim;  // groups: heads of queries to a head of keys
  const int64_t* length;              // [B]
  float scale;
  void* out;  // [B, k, heads * groups, dim]
};

}  // namespace pyargs
