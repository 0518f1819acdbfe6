// pyargs._C.Stack and Cache: memory, packing, and the threads of a pass. Baseline only; pyargs/lm/native.py checks what
// it passes and words the errors.

#include "module.h"

#include <pybind11/stl.h>
#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../cpu.h"
#include "stack.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace py = pybind11;

namespace pyargs {

#define PYARGS_DECLARE(capability)                     \
  namespace capability {                               \
  void run_pass(const lm::Pass&, int64_t);             \
  void run_projection(const lm::Projection&, int64_t); \
  }
PYARGS_DECLARE(baseline)
#ifdef PYARGS_X86
PYARGS_DECLARE(avx2)
PYARGS_DECLARE(avx512)
PYARGS_DECLARE(avx512_bf16)
#endif
#undef PYARGS_DECLARE

namespace lm {
namespace {

void check(bool ok, const char* message) {
  if (!ok) [[unlikely]]
    throw std::runtime_error(std::string("pyargs: ") + message);
}

// Bytes of several arrays one after the other, each on cache lines of its own.
class Layout {
 public:
  int64_t add(int64_t bytes) {
    const int64_t at = size_;
    size_ += (bytes + 63) / 64 * 64;
#ifdef __SANITIZE_ADDRESS__
    fences_.push_back(size_);
    size_ += 64;
#endif
    return at;
  }
  int64_t size() const { return size_; }

  // With AddressSanitizer: nothing may be read or written behind an array.
  void fence([[maybe_unused]] char* data) const {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(data, size_);
    for (int64_t at : fences_) __asan_poison_memory_region(data + at, 64);
#endif
  }

 private:
  int64_t size_ = 0;
#ifdef __SANITIZE_ADDRESS__
  std::vector<int64_t> fences_;
#endif
};

// Zeroed memory in huge pages where the system has them: a pass reads gigabytes, and 4 KiB pages cost a part of the
// rate.
class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { free(); }

  // Makes room for these arrays. What was there before is lost.
  char* reserve(const Layout& layout) {
    if (layout.size() > room()) {
      free();
      const int64_t size = layout.size() + kHuge;
      void* mapped = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (mapped == MAP_FAILED) throw std::bad_alloc();
      mapped_ = mapped;
      size_ = size;
#ifdef MADV_HUGEPAGE
      madvise(data(), room(), MADV_HUGEPAGE);
#endif
    }
    layout.fence(data());
    return data();
  }

 private:
  static constexpr int64_t kHuge = 2 << 20;

  int64_t room() const { return size_ - kHuge; }
  char* data() const {
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(mapped_) + kHuge - 1) / kHuge * kHuge);
  }
  void free() {
    if (!mapped_) return;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(mapped_, size_);
#endif
    munmap(mapped_, size_);
    mapped_ = nullptr;
    size_ = kHuge;
  }

  void* mapped_ = nullptr;
  int64_t size_ = kHuge;
};

template <class Work>
void in_parallel(int64_t workers, const Work& work) {
  torch::stable::parallel_for(0, workers, 1, [&work](int64_t begin, int64_t) { work(begin); });
}

template <class T>
const T* pointer(uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

template <class To, class From>
To convert(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else if constexpr (std::is_same_v<To, float>) {
    return float_from_bfloat16(value);
  } else {
    return bfloat16_from_float(value);
  }
}

struct Cache {
  Cache(int64_t layers, int64_t kv_heads, int64_t head_dim, int64_t rows, int64_t places, uintptr_t cosine,
        uintptr_t sine)
      : layers(layers),
        kv_heads(kv_heads),
        head_dim(head_dim),
        rows(rows),
        places(places),
        capacity(padded(places)),
        length(rows, 0),
        branch(rows),
        cosine(pointer<float>(cosine), pointer<float>(cosine) + places * head_dim / 2),
        sine(pointer<float>(sine), pointer<float>(sine) + places * head_dim / 2) {
    const int64_t all = layers * rows * kv_heads * capacity * sizeof(float);
    Layout layout;
    const int64_t at_keys = layout.add(all * head_dim), at_values = layout.add(all * padded(head_dim));
    char* data = memory.reserve(layout);
    keys = reinterpret_cast<float*>(data + at_keys);
    values = reinterpret_cast<float*>(data + at_values);
  }

  // The branch at slot[i] becomes the next token of cache row row[i] (or i); a negative slot leaves its row alone.
  void commit(uintptr_t slot_address, uintptr_t row_address, int64_t count) {
    const auto *slot = pointer<int64_t>(slot_address), *row = pointer<int64_t>(row_address);
    std::vector<bool> used(rows);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t r = row ? row[i] : i;
      check(r >= 0 && r < rows, "a row is not in the cache");
      check(!used[r], "a row of the cache is there twice");
      used[r] = true;
      const int64_t width = branch[r].size();
      check(slot[i] < 0 || (slot[i] < width && branch[r][slot[i]]), "a slot is no branch of the row's last pass");
    }
    const int64_t wide = padded(head_dim);
    for (int64_t i = 0; i < count; ++i) {
      if (slot[i] < 0) continue;
      const int64_t r = row ? row[i] : i, to = length[r]++, from = to + slot[i];
      branch[r].clear();
      if (to == from) continue;
      for (int64_t l = 0; l < layers; ++l) {
        for (int64_t h = 0; h < kv_heads; ++h) {
          const int64_t at = ((l * rows + r) * kv_heads + h) * capacity;
          float *k = keys + at * head_dim, *v = values + at * wide;
          const auto place = [&](int64_t t) { return k + t / kPanel * kPanel * head_dim + t % kPanel; };
          for (int64_t d = 0; d < head_dim; ++d) place(to)[d * kPanel] = place(from)[d * kPanel];
          std::memcpy(v + to * wide, v + from * wide, wide * sizeof(float));
        }
      }
    }
  }

  // Row `to` becomes the first `tokens` of row `from`.
  void copy(int64_t to, int64_t from, int64_t tokens) {
    check(std::min(to, from) >= 0 && std::max(to, from) < rows, "a row is not in the cache");
    check(to != from, "a row is no copy of itself");
    check(tokens >= 0 && tokens <= length[from], "a row has not as many tokens");
    const int64_t k = padded(tokens) * head_dim, v = tokens * padded(head_dim);
    length[to] = tokens;
    branch[to].clear();
    for (int64_t l = 0; l < layers; ++l) {
      for (int64_t h = 0; h < kv_heads; ++h) {
        const int64_t source = ((l * rows + from) * kv_heads + h) * capacity;
        const int64_t target = ((l * rows + to) * kv_heads + h) * capacity;
        std::memcpy(keys + target * head_dim, keys + source * head_dim, k * sizeof(float));
        std::memcpy(values + target * padded(head_dim), values + source * padded(head_dim), v * sizeof(float));
      }
    }
  }

  int64_t layers, kv_heads, head_dim, rows, places, capacity;
  std::vector<int64_t> length;            // of each row's prefix
  std::vector<std::vector<bool>> branch;  // of each row's last pass, those that `commit` can take
  std::vector<float> cosine, sine;
  Memory memory;
  float *keys = nullptr, *values = nullptr;
};

class Stack {
 public:
  Stack(const std::string& dtype, int64_t dim, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t inner,
        int64_t layers, int64_t vocabulary, bool unembedding, float epsilon)
      : layers_(layers), vocabulary_(vocabulary), weights_(std::make_shared<Memory>()) {
    model_.dtype = dtype == "bfloat16" ? Dtype::kBFloat16 : Dtype::kFloat32;
    model_.dim = dim;
    model_.heads = heads;
    model_.kv_heads = kv_heads;
    model_.head_dim = head_dim;
    model_.inner = inner;
    model_.layers = layers;
    model_.epsilon = epsilon;
    model_.layer = layers_.data();
    Layout layout;
    std::vector<std::pair<Matrix*, int64_t>> places;
    const auto add = [&](Matrix& matrix, int64_t columns, int64_t depth) {
      matrix.columns = columns;
      matrix.depth = depth + (bfloat16() ? depth % 2 : 0);
      places.emplace_back(&matrix, layout.add(matrix.columns * matrix.depth * size()));
    };
    for (Layer& layer : layers_) {
      add(layer.qkv, padded((heads + 2 * kv_heads) * head_dim), dim);
      add(layer.o, padded(dim), heads * head_dim);
      add(layer.gate_up, 2 * padded(inner), dim);
      add(layer.down, padded(dim), inner);
    }
    add(head_, unembedding ? padded(vocabulary) : 0, dim);
    const int64_t panels = layout.add(head_.columns * padded(dim) / (kPanel * kGroup) * kGroupBytes);
    const int64_t error = layout.add(head_.columns * sizeof(float));
    char* data = weights_->reserve(layout);
    screen_ = {data + panels, reinterpret_cast<float*>(data + error)};
    for (auto [matrix, at] : places) matrix->weight = data + at;
  }

  // A second stack on the same weights, for a delta of its own.
  Stack(const Stack& other)
      : model_(other.model_),
        layers_(other.layers_),
        head_(other.head_),
        screen_(other.screen_),
        vocabulary_(other.vocabulary_),
        max_rank_(other.max_rank_),
        weights_(other.weights_),
        kept_(other.kept_) {
    model_.layer = layers_.data();
  }

  // A matrix, and rows [rows, depth] of a weight: row n becomes column offset + n, or with every second panel left out.
  using Part = std::tuple<std::string, int64_t, bool, uintptr_t, Dtype, int64_t, int64_t>;

  // All parts of a layer at once: a parallel region waits for every thread, and another process may have its core.
  void pack(int64_t layer, const std::vector<Part>& parts) {
    std::vector<std::function<void(int64_t)>> panels;
    std::vector<std::pair<size_t, int64_t>> tasks;
    for (const auto& [name, offset, alternate, weight, dtype, rows, depth] : parts) {
      const Matrix& to = matrix(layer, name);
      const bool wide = dtype == Dtype::kFloat32;
      for (int64_t panel = 0; panel * kPanel < rows; ++panel) tasks.emplace_back(panels.size(), panel);
      panels.push_back(bfloat16() ? wide ? packer<uint16_t, float>(to, offset, alternate, weight, rows, depth)
                                         : packer<uint16_t, uint16_t>(to, offset, alternate, weight, rows, depth)
                       : wide     ? packer<float, float>(to, offset, alternate, weight, rows, depth)
                                  : packer<float, uint16_t>(to, offset, alternate, weight, rows, depth));
    }
    torch::stable::parallel_for(0, tasks.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto [part, panel] = tasks[i];
        panels[part](panel);
        if (std::get<0>(parts[part]) == "head") bfloat16() ? screen<uint16_t>(panel) : screen<float>(panel);
      }
    });
  }

  void bias(int64_t layer, const std::string& name, uintptr_t values) {
    Matrix& matrix = this->matrix(layer, name);
    matrix.bias = keep(values, matrix.columns);
  }

  void delta(int64_t layer, const std::string& name, int64_t rank, uintptr_t a, uintptr_t b) {
    Matrix& matrix = this->matrix(layer, name);
    check(matrix.rank == 0, "a stack has one delta");
    matrix.rank = rank;
    matrix.a = keep(a, rank * matrix.depth);
    matrix.b = keep(b, rank * matrix.columns);
    max_rank_ = std::max(max_rank_, rank);
  }

  void norms(int64_t layer, uintptr_t attention, uintptr_t mlp) {
    layers_.at(layer).attention_norm = keep(attention, model_.dim);
    layers_.at(layer).mlp_norm = keep(mlp, model_.dim);
  }

  // The embedding stays the caller's, who keeps it alive.
  void embedding(uintptr_t embedding, Dtype dtype, uintptr_t norm) {
    model_.embedding = pointer<void>(embedding);
    model_.embedding_dtype = dtype;
    model_.norm = keep(norm, model_.dim);
  }

  void forward(Cache& cache, uintptr_t ids_address, uintptr_t mask_address, uintptr_t rows_address,
               uintptr_t delta_address, int64_t count, int64_t width, bool branches, uintptr_t states) {
    const std::lock_guard lock(mutex_);
    const auto *ids = pointer<int64_t>(ids_address), *rows = pointer<int64_t>(rows_address);
    const auto *mask = pointer<bool>(mask_address), *delta = pointer<bool>(delta_address);
    check(cache.layers == model_.layers && cache.kv_heads == model_.kv_heads && cache.head_dim == model_.head_dim,
          "the cache belongs to a stack of other sizes");
    std::vector<Query> queries;
    queries.reserve(count * width);
    std::vector<int64_t> length = cache.length;
    std::vector<bool> used(cache.rows);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = rows ? rows[i] : i;
      check(row >= 0 && row < cache.rows, "a row is not in the cache");
      check(!used[row], "a row of the cache is there twice");
      used[row] = true;
      for (int64_t j = 0; j < width; ++j) {
        const int64_t at = i * width + j;
        if (mask && !mask[at]) continue;
        check(ids[at] >= 0 && ids[at] < vocabulary_, "a token is not in the vocabulary");
        const int64_t seen = length[row], place = branches ? seen + j : length[row]++;
        check(place < cache.places, "the cache is full: give it a larger capacity");
        queries.push_back({ids[at], row, place, seen, at, delta && delta[i]});
      }
    }
    for (size_t begin = 0; begin < queries.size(); begin += kQueriesPerPass) {
      run(cache, queries.data() + begin, std::min<int64_t>(kQueriesPerPass, queries.size() - begin),
          reinterpret_cast<float*>(states));
    }
    cache.length = length;
    for (int64_t i = 0; i < count; ++i) cache.branch[rows ? rows[i] : i].assign(branches ? width : 0, false);
    for (const Query& query : queries) {
      if (branches) cache.branch[query.row][query.place - query.seen] = true;
    }
  }

  void logits(uintptr_t states, int64_t rows, int64_t top, int64_t vocabulary, uintptr_t logits) {
    const std::lock_guard lock(mutex_);
    if (rows > (bfloat16() ? kScreenRows16 : kScreenRows) || top > std::min(kTop, vocabulary) || head_.bias) top = 0;
    for (int64_t begin = 0; begin < rows; begin += kQueriesPerPass) {
      Projection projection{};
      projection.dtype = model_.dtype;
      projection.matrix = head_;
      projection.matrix.columns = padded(vocabulary);
      projection.screen = screen_;
      projection.rows = std::min(kQueriesPerPass, rows - begin);
      projection.dim = model_.dim;
      projection.vocabulary = vocabulary;
      projection.top = top;
      projection.workers = torch::stable::get_num_threads();
      projection.states = pointer<float>(states) + begin * model_.dim;
      projection.logits = reinterpret_cast<float*>(logits) + begin * vocabulary;
      const int64_t numbers = projection.rows * padded(model_.dim), best = projection.workers * projection.rows * top;
      const int64_t phases = 3 * projection.workers;  // at most
      Layout layout;
      const int64_t x = layout.add(numbers * size()),
                    floats = layout.add(top > 0 && bfloat16() ? numbers * sizeof(float) : 0),
                    length = layout.add(projection.rows * sizeof(float)), bests = layout.add(best * sizeof(float)),
                    phase = layout.add(phases * sizeof(Phase));
      char* memory = memory_.reserve(layout);
      projection.x = memory + x;
      projection.floats = reinterpret_cast<float*>(memory + floats);
      projection.length = reinterpret_cast<float*>(memory + length);
      projection.best = reinterpret_cast<float*>(memory + bests);
      std::fill_n(projection.best, best, -std::numeric_limits<float>::infinity());
      projection.phase = zeroed(memory + phase, phases);
      in_parallel(projection.workers, [&projection](int64_t worker) {
#ifdef PYARGS_X86
        if (cpu_capability() == Capability::kAvx512Bf16) return avx512_bf16::run_projection(projection, worker);
#endif
        PYARGS_DISPATCH(run_projection, projection, worker);
      });
    }
  }

 private:
  bool bfloat16() const { return model_.dtype == Dtype::kBFloat16; }
  int64_t size() const { return bfloat16() ? 2 : 4; }

  Matrix& matrix(int64_t layer, const std::string& name) {
    if (name == "head") return head_;
    Layer& of = layers_.at(layer);
    return name == "qkv" ? of.qkv : name == "o" ? of.o : name == "gate_up" ? of.gate_up : of.down;
  }

  // Where a packed matrix has a column's weight.
  template <class To>
  static int64_t place(const Matrix& matrix, int64_t column, int64_t d) {
    constexpr int64_t kPair = 4 / sizeof(To);
    return column / kPanel * kPanel * matrix.depth + (d / kPair * kPanel + column % kPanel) * kPair + d % kPair;
  }

  // Packs one panel of the rows.
  template <class To, class From>
  std::function<void(int64_t)> packer(const Matrix& matrix, int64_t offset, bool alternate, uintptr_t weight,
                                      int64_t rows, int64_t depth) {
    constexpr int64_t kDepth = 64;  // a part of a panel that stays in the first-level cache
    const auto column = [=](int64_t n) { return offset + n + (alternate ? n / kPanel * kPanel : 0); };
    check(depth <= matrix.depth && column(rows - 1) < matrix.columns, "a weight is too large for its matrix");
    To* packed = static_cast<To*>(const_cast<void*>(matrix.weight));
    return [=, &matrix](int64_t panel) {
      for (int64_t start = 0; start < depth; start += kDepth) {
        for (int64_t n = panel * kPanel; n < std::min((panel + 1) * kPanel, rows); ++n) {
          const From* from = pointer<From>(weight) + n * depth;
          for (int64_t d = start; d < std::min(start + kDepth, depth); ++d) {
            packed[place<To>(matrix, column(n), d)] = convert<To>(from[d]);
          }
        }
      }
    };
  }

  // A packed panel of the head in eight bits. The error is that of the weights and what the sums of both products lose
  // by rounding, each at most depth / 2^24 |w| |x|, with as much again to spare.
  template <class To>
  void screen(int64_t panel) {
    const int64_t dim = model_.dim;
    const auto* packed = static_cast<const To*>(head_.weight);
    char* group = const_cast<char*>(screen_.panels) + panel * (padded(dim) / kGroup) * kGroupBytes;
    float length[kPanel] = {}, wrong[kPanel] = {};  // squared
    bool empty[kPanel];
    std::fill_n(empty, kPanel, true);
    for (int64_t start = 0; start < dim; start += kGroup, group += kGroupBytes) {
      float weight[kGroup][kPanel] = {}, largest[kPanel] = {}, scale[kPanel], inverse[kPanel];
      for (int64_t i = 0; i < std::min(kGroup, dim - start); ++i) {
        for (int64_t n = 0; n < kPanel; ++n) {
          weight[i][n] = convert<float>(packed[place<To>(head_, panel * kPanel + n, start + i)]);
          largest[n] = std::max(largest[n], std::abs(weight[i][n]));
          length[n] += weight[i][n] * weight[i][n];
        }
      }
      for (int64_t n = 0; n < kPanel; ++n) {
        scale[n] = largest[n] > kShortest * kShortest ? largest[n] / 127.0f : 0.0f;
        inverse[n] = scale[n] > 0.0f ? 1.0f / scale[n] : 0.0f;
        empty[n] &= largest[n] == 0.0f;
      }
      std::memcpy(group, scale, sizeof scale);
      for (int64_t i = 0; i < kGroup; ++i) {
        for (int64_t n = 0; n < kPanel; ++n) {
          constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
          const float near = (weight[i][n] * inverse[n] + kRound) - kRound;
          const float held = std::abs(near) <= 127.0f ? near : 0.0f;
          const float off = weight[i][n] - held * scale[n];
          wrong[n] += off * off;
          group[sizeof scale + i / 4 * 4 * kPanel + n * 4 + i % 4] = static_cast<char>(static_cast<int8_t>(held));
        }
      }
    }
    for (int64_t n = 0; n < kPanel; ++n) {
      const float all = std::sqrt(length[n]), off = std::sqrt(wrong[n]);
      const float error = (off + std::ldexp(static_cast<float>(dim + kGroup), -22) * (all + off)) * 1.01f;
      const bool known = (all >= kShortest && all <= kLongest) || (all == 0.0f && empty[n]);
      const_cast<float*>(screen_.error)[panel * kPanel + n] = known ? error : std::numeric_limits<float>::infinity();
    }
  }

  const float* keep(uintptr_t values, int64_t count) {
    const auto* from = pointer<float>(values);
    return kept_.emplace_back(std::make_shared<std::vector<float>>(from, from + count))->data();
  }

  static Phase* zeroed(char* memory, int64_t count) {
    std::memset(memory, 0, count * sizeof(Phase));
    return reinterpret_cast<Phase*>(memory);
  }

  void run(Cache& cache, const Query* queries, int64_t count, float* states) {
    Pass pass = model_;
    pass.workers = torch::stable::get_num_threads();
    const int64_t share = pass.heads / pass.kv_heads;
    const int64_t most = std::max<int64_t>(1, kAttentionRows / share);
    std::vector<Group> groups;
    for (int64_t begin = 0; begin < count;) {
      int64_t end = begin + 1;
      while (end < count && queries[end].row == queries[begin].row) ++end;
      const int64_t parts = (end - begin + most - 1) / most;
      for (int64_t p = 0; p < parts; ++p) {
        groups.push_back({static_cast<int32_t>(begin + (end - begin) * p / parts),
                          static_cast<int32_t>(begin + (end - begin) * (p + 1) / parts)});
      }
      begin = end;
    }
    pass.keys = cache.keys;
    pass.values = cache.values;
    pass.rows = cache.rows;
    pass.capacity = cache.capacity;
    pass.cosine = cache.cosine.data();
    pass.sine = cache.sine.data();
    pass.query = queries;
    pass.queries = count;
    pass.group = groups.data();
    pass.groups = groups.size();
    pass.any_delta = std::any_of(queries, queries + count, [](const Query& query) { return query.delta; });
    pass.states = states;

    const int64_t rows = most * share, wide = padded(pass.head_dim),
                  reads = std::max(pass.inner, pass.heads * pass.head_dim);
    pass.scratch_size =
        padded(std::max(rows * (pass.head_dim + wide + kAttentionPlaces + 2), std::max(reads, pass.dim) + 1));
    const int64_t phases = (pass.layers * kPhasesPerLayer + 2) * pass.workers;
    Layout layout;
    const int64_t residual = layout.add(count * padded(pass.dim) * 4),
                  qkv = layout.add(count * layers_[0].qkv.columns * 4), low = layout.add(count * max_rank_ * 4),
                  scratch = layout.add(pass.workers * pass.scratch_size * 4),
                  x = layout.add(count * padded(pass.dim) * size()), y = layout.add(count * padded(reads) * size()),
                  phase = layout.add(phases * sizeof(Phase));
    char* memory = memory_.reserve(layout);
    pass.residual = reinterpret_cast<float*>(memory + residual);
    pass.qkv = reinterpret_cast<float*>(memory + qkv);
    pass.low = reinterpret_cast<float*>(memory + low);
    pass.scratch = reinterpret_cast<float*>(memory + scratch);
    pass.x = memory + x;
    pass.y = memory + y;
    pass.phase = zeroed(memory + phase, phases);
    in_parallel(pass.workers, [&pass](int64_t worker) {
#ifdef PYARGS_X86
      if (cpu_capability() == Capability::kAvx512Bf16) return avx512_bf16::run_pass(pass, worker);
#endif
      PYARGS_DISPATCH(run_pass, pass, worker);
    });
  }

  Pass model_{};
  std::vector<Layer> layers_;
  Matrix head_{};
  Screen screen_{};
  int64_t vocabulary_, max_rank_ = 0;
  std::shared_ptr<Memory> weights_;
  std::vector<std::shared_ptr<const std::vector<float>>> kept_;  // biases, norms, deltas
  Memory memory_;
  std::mutex mutex_;
};

}  // namespace

void bind(py::module_& m) {
  using unlocked = py::call_guard<py::gil_scoped_release>;
  py::enum_<Dtype>(m, "Dtype").value("float32", Dtype::kFloat32).value("bfloat16", Dtype::kBFloat16);
  py::class_<Cache>(m, "Cache")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, int64_t, uintptr_t, uintptr_t>())
      .def("commit", &Cache::commit)
      .def("copy", &Cache::copy)
      .def_readonly("rows", &Cache::rows)
      .def_property(
          "length", [](const Cache& cache) { return cache.length; },
          [](Cache& cache, std::vector<int64_t> length) {
            check(static_cast<int64_t>(length.size()) == cache.rows, "the cache needs a length for each row");
            for (int64_t one : length) check(one >= 0 && one <= cache.places, "a length lies outside the cache");
            cache.length = std::move(length);
            cache.branch.assign(cache.rows, {});
          });
  py::class_<Stack>(m, "Stack")
      .def(py::init<const std::string&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, float>())
      .def("twin", [](const Stack& stack) { return std::make_unique<Stack>(stack); })
      .def("pack", &Stack::pack, unlocked())
      .def("bias", &Stack::bias)
      .def("delta", &Stack::delta)
      .def("norms", &Stack::norms)
      .def("embedding", &Stack::embedding)
      .def("forward", &Stack::forward, unlocked())
      .def("logits", &Stack::logits, unlocked());
}

}  // namespace lm
}  // namespace pyargs
