// Keys and values of several sequences. Baseline only; pyargs/lm/stack/run.py says what they are for.
#include "cache.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "check.h"
#include "memory.h"

namespace pyargs {

using namespace stack;

Cache::Cache(int64_t layers, int64_t kv_heads, int64_t head_dim, int64_t rows, const View& cosine, const View& sine)
    : state_(std::make_unique<State>()) {
  State& s = *state_;
  check(std::min({layers, kv_heads, head_dim}) >= 1 && std::max({layers, kv_heads, head_dim}) <= kLargest,
        "the sizes of a cache must be positive numbers");
  check(head_dim % 2 == 0, "head_dim must be even");
  check(rows >= 0 && rows <= kMostRows, "a cache has at most 1048576 rows");
  s.layers = layers;
  s.kv_heads = kv_heads;
  s.head_dim = head_dim;
  s.rows = rows;
  s.places = require("cosine", cosine, View::kFloat32, {-1, head_dim / 2}).size(0);
  require("sine", sine, View::kFloat32, {s.places, head_dim / 2});
  s.cosine.assign(cosine.as<const float>(), cosine.as<const float>() + cosine.size());
  s.sine.assign(sine.as<const float>(), sine.as<const float>() + sine.size());
  s.capacity = padded(s.places);
  Layout layout;
  const int64_t all = product_of({layers, rows, kv_heads, s.capacity});
  const int64_t at_keys = layout.add({all, head_dim, sizeof(float)});
  const int64_t at_values = layout.add({all, padded(head_dim), sizeof(float)});
  char* data = s.memory.reserve(layout);  // before what is smaller by far
  s.keys = reinterpret_cast<float*>(data + at_keys);
  s.values = reinterpret_cast<float*>(data + at_values);
  s.length.assign(rows, 0);
  s.branch.resize(rows);
}

Cache::~Cache() = default;

int64_t Cache::rows() const { return state_->rows; }

std::vector<int64_t> Cache::length() const {
  const std::lock_guard lock(state_->mutex);
  return state_->length;
}

void Cache::commit(const View& slot, const std::optional<View>& rows_given) {
  State& s = *state_;
  const int64_t count = require("slot", slot, View::kInt64, {-1}).size(0);
  const std::lock_guard lock(s.mutex);
  const std::vector<int64_t> row = s.checked_rows(rows_given, count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = slot.as<const int64_t>()[i], width = s.branch[row[i]].size();
    check(at < 0 || (at < width && s.branch[row[i]][at]), "a slot is no branch of the row's last pass");
  }
  const int64_t head_dim = s.head_dim, wide = padded(head_dim);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = slot.as<const int64_t>()[i], r = row[i];
    if (at < 0) continue;
    const int64_t to = s.length[r]++, from = to + at;
    s.branch[r].clear();
    if (to == from) continue;
    for (int64_t l = 0; l < s.layers; ++l) {
      for (int64_t h = 0; h < s.kv_heads; ++h) {
        const int64_t start = s.head(l, r, h);
        float *k = s.keys + start * head_dim, *v = s.values + start * wide;
        const auto place = [&](int64_t t) { return k + t / kPanel * kPanel * head_dim + t % kPanel; };
        for (int64_t d = 0; d < head_dim; ++d) place(to)[d * kPanel] = place(from)[d * kPanel];
        std::memcpy(v + to * wide, v + from * wide, wide * sizeof(float));
      }
    }
  }
}

void Cache::copy(const Cache& source, int64_t to, int64_t from, int64_t tokens) {
  State& s = *state_;
  const State& other = *source.state_;
  check(other.layers == s.layers && other.kv_heads == s.kv_heads && other.head_dim == s.head_dim,
        "the caches are of different models");
  check(to >= 0 && to < s.rows && from >= 0 && from < other.rows, "a row is not in the cache");
  check(to != from || &other != &s, "a row is no copy of itself");
  std::unique_lock lock(s.mutex, std::defer_lock), others(other.mutex, std::defer_lock);
  &other == &s ? lock.lock() : std::lock(lock, others);
  check(tokens >= 0 && tokens <= other.length[from], "a row has not as many tokens");
  check(tokens <= s.places, "a row is longer than the cache");
  const int64_t wide = padded(s.head_dim), k = padded(tokens) * s.head_dim, v = tokens * wide;
  s.length[to] = tokens;
  s.branch[to].clear();
  for (int64_t l = 0; l < s.layers; ++l) {
    for (int64_t h = 0; h < s.kv_heads; ++h) {
      const int64_t begin = other.head(l, from, h), target = s.head(l, to, h);
      std::memcpy(s.keys + target * s.head_dim, other.keys + begin * s.head_dim, k * sizeof(float));
      std::memcpy(s.values + target * wide, other.values + begin * wide, v * sizeof(float));
    }
  }
}

void Cache::set_length(std::vector<int64_t> wanted) {
  State& s = *state_;
  check(static_cast<int64_t>(wanted.size()) == s.rows, "the cache needs a length for each row");
  for (int64_t one : wanted) check(one >= 0 && one <= s.places, "a length lies outside the cache");
  const std::lock_guard lock(s.mutex);
  s.length = std::move(wanted);
  s.branch.assign(s.rows, {});
}

std::vector<int64_t> Cache::State::checked_rows(const std::optional<View>& given, int64_t count) const {
  std::vector<int64_t> found(count);
  if (!given) {
    check(count <= rows, "more rows than the cache has");
    for (int64_t i = 0; i < count; ++i) found[i] = i;
    return found;
  }
  require("rows", *given, View::kInt64, {count});
  std::copy_n(given->as<const int64_t>(), count, found.begin());
  std::vector<bool> used(rows);
  for (int64_t row : found) {
    check(row >= 0 && row < rows, "a row is not in the cache");
    check(!used[row], "a row of the cache is there twice");
    used[row] = true;
  }
  return found;
}

}  // namespace pyargs
