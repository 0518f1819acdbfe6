// Keys and values of several sequences. Baseline only; pyargs/lm/stack/run.py says what they are for.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "memory.h"
#include "pass.h"
#include "view.h"

namespace pyargs::stack {

constexpr int64_t kLargest = (int64_t{1} << 31) - 1;  // of any size of a model
constexpr int64_t kMostRows = 1 << 20;

class Cache {
 public:
  // cosine, sine: float32 [places, head_dim / 2].
  Cache(int64_t layers, int64_t kv_heads, int64_t head_dim, int64_t rows, pybind11::handle cosine,
        pybind11::handle sine)
      : layers(layers), kv_heads(kv_heads), head_dim(head_dim), rows(rows) {
    check(std::min({layers, kv_heads, head_dim}) >= 1 && std::max({layers, kv_heads, head_dim}) <= kLargest,
          "the sizes of a cache must be positive numbers");
    check(head_dim % 2 == 0, "head_dim must be even");
    check(rows >= 0 && rows <= kMostRows, "a cache has at most 1048576 rows");
    const View cosines("cosine", cosine, View::kFloat32, {-1, head_dim / 2});
    places = cosines.size(0);
    const View sines("sine", sine, View::kFloat32, {places, head_dim / 2});
    this->cosine.assign(cosines.data<float>(), cosines.data<float>() + cosines.size());
    this->sine.assign(sines.data<float>(), sines.data<float>() + sines.size());
    capacity = padded(places);
    Layout layout;
    const int64_t all = product_of({layers, rows, kv_heads, capacity});
    const int64_t at_keys = layout.add({all, head_dim, sizeof(float)});
    const int64_t at_values = layout.add({all, padded(head_dim), sizeof(float)});
    char* data = memory_.reserve(layout);  // before what is smaller by far
    keys = reinterpret_cast<float*>(data + at_keys);
    values = reinterpret_cast<float*>(data + at_values);
    length.assign(rows, 0);
    branch.resize(rows);
  }

  // The branch at slot[i] becomes the next token of cache row rows[i] (or i); a negative slot leaves its row alone.
  void commit(pybind11::handle slots, pybind11::handle to_rows) {
    const View slot("slot", slots, View::kInt64, {-1});
    const int64_t count = slot.size();
    const std::vector<int64_t> row = checked_rows(to_rows, count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = slot.data<int64_t>()[i], width = branch[row[i]].size();
      check(at < 0 || (at < width && branch[row[i]][at]), "a slot is no branch of the row's last pass");
    }
    const int64_t wide = padded(head_dim);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = slot.data<int64_t>()[i], r = row[i];
      if (at < 0) continue;
      const int64_t to = length[r]++, from = to + at;
      branch[r].clear();
      if (to == from) continue;
      for (int64_t l = 0; l < layers; ++l) {
        for (int64_t h = 0; h < kv_heads; ++h) {
          const int64_t start = ((l * rows + r) * kv_heads + h) * capacity;
          float *k = keys + start * head_dim, *v = values + start * wide;
          const auto place = [&](int64_t t) { return k + t / kPanel * kPanel * head_dim + t % kPanel; };
          for (int64_t d = 0; d < head_dim; ++d) place(to)[d * kPanel] = place(from)[d * kPanel];
          std::memcpy(v + to * wide, v + from * wide, wide * sizeof(float));
        }
      }
    }
  }

  // Row `to` becomes the first `tokens` of row `from` of this cache or of another one of the same model.
  void copy(const Cache& other, int64_t to, int64_t from, int64_t tokens) {
    check(other.layers == layers && other.kv_heads == kv_heads && other.head_dim == head_dim,
          "the caches are of different models");
    check(to >= 0 && to < rows && from >= 0 && from < other.rows, "a row is not in the cache");
    check(to != from || &other != this, "a row is no copy of itself");
    check(tokens >= 0 && tokens <= other.length[from], "a row has not as many tokens");
    check(tokens <= places, "a row is longer than the cache");
    const int64_t k = padded(tokens) * head_dim, v = tokens * padded(head_dim);
    length[to] = tokens;
    branch[to].clear();
    for (int64_t l = 0; l < layers; ++l) {
      for (int64_t h = 0; h < kv_heads; ++h) {
        const int64_t source = ((l * other.rows + from) * kv_heads + h) * other.capacity;
        const int64_t target = ((l * rows + to) * kv_heads + h) * capacity;
        std::memcpy(keys + target * head_dim, other.keys + source * head_dim, k * sizeof(float));
        std::memcpy(values + target * padded(head_dim), other.values + source * padded(head_dim), v * sizeof(float));
      }
    }
  }

  void set_length(std::vector<int64_t> wanted) {
    check(static_cast<int64_t>(wanted.size()) == rows, "the cache needs a length for each row");
    for (int64_t one : wanted) check(one >= 0 && one <= places, "a length lies outside the cache");
    length = std::move(wanted);
    branch.assign(rows, {});
  }

  // Which rows of the cache are meant: int64 [count], none twice; the first ones if None is given.
  std::vector<int64_t> checked_rows(pybind11::handle given, int64_t count) const {
    std::vector<int64_t> found(count);
    if (given.is_none()) {
      check(count <= rows, "more rows than the cache has");
      for (int64_t i = 0; i < count; ++i) found[i] = i;
      return found;
    }
    const View view("rows", given, View::kInt64, {count});
    std::copy_n(view.data<int64_t>(), count, found.begin());
    std::vector<bool> used(rows);
    for (int64_t row : found) {
      check(row >= 0 && row < rows, "a row is not in the cache");
      check(!used[row], "a row of the cache is there twice");
      used[row] = true;
    }
    return found;
  }

  int64_t layers, kv_heads, head_dim, rows, places = 0, capacity = 0;
  std::vector<int64_t> length;            // of each row's prefix
  std::vector<std::vector<bool>> branch;  // of each row's last pass, those that `commit` can take
  std::vector<float> cosine, sine;
  float *keys = nullptr, *values = nullptr;

 private:
  Memory memory_;
};

}  // namespace pyargs::stack
