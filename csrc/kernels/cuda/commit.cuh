// The chosen branch becomes the prefix's next token in the keys and values of all layers: one launch, a block for each
// tensor, row and head. NOT YET RUN ON A GPU.
#pragma once

#include "../rows.h"
#include "platform.h"

namespace pyargs::cuda {

constexpr int kCommitThreads = 32;

// Lengths are read on the device, so that a captured graph need not know them. A row without a choice (slot -1) and one
// whose length or slot lies outside the states keep what they have.
__global__ void __launch_bounds__(kCommitThreads) commit_kernel(CommitRows a, int64_t capacity) {
  const int64_t row = blockIdx.x / a.heads, head = blockIdx.x % a.heads;
  const int64_t slot = a.slot[row], length = a.length[row];
  if (slot <= 0 || length < 0 || slot >= capacity - length) return;
  char* to = static_cast<char*>(a.states[blockIdx.y]) + row * a.stride_b + head * a.stride_h + length * a.stride_t;
  const char* from = to + slot * a.stride_t;
  const int lane = static_cast<int>(threadIdx.x);
  const bool vectors = (reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | a.bytes) % 16 == 0;
  if (vectors) {
    for (int64_t i = lane; i < a.bytes / 16; i += kCommitThreads) {
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
    }
  } else {
    for (int64_t i = lane; i < a.bytes; i += kCommitThreads) to[i] = from[i];
  }
}

}  // namespace pyargs::cuda
