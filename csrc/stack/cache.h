// What a cache holds, for the passes of a stack. Baseline only.
#pragma once

#include <mutex>
#include <vector>

#include "../include/pyargs/stack.h"
#include "memory.h"
#include "pass.h"

namespace pyargs {

namespace stack {

constexpr int64_t kLargest = (int64_t{1} << 31) - 1;  // of any size of a model
constexpr int64_t kMostRows = 1 << 20;

}  // namespace stack

struct Cache::State {
  // Which rows of the cache are meant: int64 [count], none twice; the first ones if none are given.
  std::vector<int64_t> checked_rows(const std::optional<View>& given, int64_t count) const;

  // Where keys and values of a head of a row begin, in places.
  int64_t head(int64_t layer, int64_t row, int64_t head) const {
    return ((layer * rows + row) * kv_heads + head) * capacity;
  }

  int64_t layers = 0, kv_heads = 0, head_dim = 0, rows = 0, places = 0, capacity = 0;
  mutable std::mutex mutex;               // of the next two
  std::vector<int64_t> length;            // of each row's prefix
  std::vector<std::vector<bool>> branch;  // of each row's last pass, those that `commit` can take
  std::vector<float> cosine, sine;
  float *keys = nullptr, *values = nullptr;
  stack::Memory memory;
};

}  // namespace pyargs
