// A decoder stack: packing its weights, and the threads of a pass. Baseline only. Nothing that Python can pass does
// more than raise; pyargs/lm/stack/run.py turns the errors into its own.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../kernels/cpu/capability.h"
#include "../kernels/cpu/floats.h"
#include "cache.h"
#include "memory.h"
#include "pass.h"
#include "view.h"

namespace pyargs {

#define PYARGS_DECLARE(capability)                        \
  namespace capability {                                  \
  void run_pass(const stack::Pass&, int64_t);             \
  void run_projection(const stack::Projection&, int64_t); \
  }
PYARGS_DECLARE(baseline)
PYARGS_DECLARE(avx2)
PYARGS_DECLARE(avx512)
PYARGS_DECLARE(avx512_bf16)
#undef PYARGS_DECLARE

namespace stack {

namespace py = pybind11;

template <class Work>
void in_parallel(int64_t workers, const Work& work) {
  torch::stable::parallel_for(0, workers, 1, [&work](int64_t begin, int64_t) { work(begin); });
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

constexpr int64_t kMostLayers = 1 << 16;

class Stack {
 public:
  Stack(const std::string& dtype, int64_t dim, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t inner,
        int64_t layers, int64_t vocabulary, bool unembedding, float epsilon)
      : vocabulary_(vocabulary), weights_(std::make_shared<Memory>()) {
    check(dtype == "float32" || dtype == "bfloat16", "weights are packed as float32 or bfloat16");
    for (int64_t size : {dim, heads, kv_heads, head_dim, inner, layers, vocabulary}) {
      check(size >= 1 && size <= kLargest, "the sizes of a stack must be positive numbers");
    }
    check(product_of({heads + 2 * kv_heads, head_dim}) <= kLargest, "the heads of a stack are too large");
    check(heads % kv_heads == 0, "heads must be a multiple of kv_heads");
    check(head_dim % 2 == 0, "head_dim must be even");
    check(layers <= kMostLayers, "a stack has at most 65536 layers");
    layers_.resize(layers);
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
      matrix.depth = held(depth);
      places.emplace_back(&matrix, layout.add({matrix.columns, matrix.depth, size()}));
    };
    for (Layer& layer : layers_) {
      add(layer.qkv, padded((heads + 2 * kv_heads) * head_dim), dim);
      add(layer.o, padded(dim), heads * head_dim);
      add(layer.gate_up, 2 * padded(inner), dim);
      add(layer.down, padded(dim), inner);
    }
    add(head_, unembedding ? padded(vocabulary) : 0, dim);
    const int64_t panels = layout.add({head_.columns / kPanel, padded(dim) / kGroup, kGroupBytes});
    const int64_t error = layout.add({head_.columns, sizeof(float)});
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
        kept_(other.kept_),
        embedding_(other.embedding_) {
    model_.layer = layers_.data();
  }

  // A matrix, and a weight [rows, depth], float32 or bfloat16: row n becomes column offset + n, or with every second
  // panel left out.
  using Part = std::tuple<std::string, int64_t, bool, py::object>;

  // All parts of a layer at once: a parallel region waits for every thread, and another process may have its core.
  void pack(int64_t layer, const std::vector<Part>& parts) {
    std::vector<View> weights;
    std::vector<std::function<void(int64_t)>> panels;
    std::vector<std::tuple<size_t, int64_t, bool>> tasks;
    for (const auto& [name, offset, alternate, given] : parts) {
      const Matrix& to = matrix(layer, name);
      const View& weight = weights.emplace_back("weight", given, View::kWeight, std::initializer_list<int64_t>{-1, -1});
      const int64_t rows = weight.size(0), depth = weight.size(1);
      const bool head = &to == &head_;
      check(rows >= 1 && held(depth) == to.depth, "a weight has not as many inputs as its matrix");
      check(offset >= 0 && offset < to.columns &&
                offset + rows + (alternate ? (rows - 1) / kPanel * kPanel : 0) <= to.columns,
            "a weight has more outputs than its matrix");
      check(!head || (offset == 0 && !alternate && rows == vocabulary_), "the output layer needs a row for each token");
      for (int64_t panel = 0; panel * kPanel < rows; ++panel) tasks.emplace_back(panels.size(), panel, head);
      const bool wide = weight.dtype() == Dtype::kFloat32;
      panels.push_back(bfloat16() ? wide ? packer<uint16_t, float>(to, offset, alternate, weight)
                                         : packer<uint16_t, uint16_t>(to, offset, alternate, weight)
                       : wide     ? packer<float, float>(to, offset, alternate, weight)
                                  : packer<float, uint16_t>(to, offset, alternate, weight));
    }
    const py::gil_scoped_release unlocked;
    torch::stable::parallel_for(0, tasks.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto [part, panel, head] = tasks[i];
        panels[part](panel);
        if (head) bfloat16() ? screen<uint16_t>(panel) : screen<float>(panel);
      }
    });
  }

  // values: float32 [columns].
  void bias(int64_t layer, const std::string& name, py::handle values) {
    Matrix& matrix = this->matrix(layer, name);
    matrix.bias = keep("bias", values, {matrix.columns});
  }

  // a: float32 [rank, depth]. b: [columns / kPanel, rank, kPanel].
  void delta(int64_t layer, const std::string& name, py::handle a, py::handle b) {
    Matrix& matrix = this->matrix(layer, name);
    check(&matrix != &head_, "the output layer has no delta");
    check(matrix.rank == 0, "a stack has one delta");
    const int64_t rank = View("a", a, View::kFloat32, {-1, matrix.depth}).size(0);
    const float* first = keep("a", a, {rank, matrix.depth});
    matrix.b = keep("b", b, {matrix.columns / kPanel, rank, kPanel});
    matrix.a = first;
    matrix.rank = rank;
    max_rank_ = std::max(max_rank_, rank);
  }

  // Both float32 [dim].
  void norms(int64_t layer, py::handle attention, py::handle mlp) {
    layers_.at(layer).attention_norm = keep("attention norm", attention, {model_.dim});
    layers_.at(layer).mlp_norm = keep("mlp norm", mlp, {model_.dim});
  }

  // The embedding [vocabulary, dim] is not copied. norm: float32 [dim].
  void embedding(py::handle embedding, py::handle norm) {
    const auto view = std::make_shared<View>("embedding", embedding, View::kWeight,
                                             std::initializer_list<int64_t>{vocabulary_, model_.dim});
    model_.norm = keep("norm", norm, {model_.dim});
    embedding_ = view;
    model_.embedding = view->data();
    model_.embedding_dtype = view->dtype();
  }

  // ids: int64 [B, n]. mask: bool [B, n] or None. rows: int64 [B] or None. delta: bool [B] or None. states: float32
  // [B, n, dim], written to.
  void forward(Cache& cache, py::handle ids_given, py::handle mask_given, py::handle rows_given, py::handle delta_given,
               bool branches, py::handle states_given) {
    const View ids("ids", ids_given, View::kInt64, {-1, -1});
    const int64_t count = ids.size(0), width = ids.size(1);
    const View states("states", states_given, View::kFloat32, {count, width, model_.dim});
    const auto optional = [](const char* name, py::handle given, std::initializer_list<int64_t> shape) {
      return given.is_none() ? std::nullopt : std::make_optional<View>(name, given, View::kBool, shape);
    };
    const std::optional<View> mask = optional("mask", mask_given, {count, width});
    const std::optional<View> delta = optional("delta", delta_given, {count});
    check(cache.layers == model_.layers && cache.kv_heads == model_.kv_heads && cache.head_dim == model_.head_dim,
          "the cache belongs to a stack of other sizes");
    check(model_.embedding && std::all_of(layers_.begin(), layers_.end(), [](const Layer& l) { return l.mlp_norm; }),
          "the stack is not packed yet");
    const std::vector<int64_t> rows = cache.checked_rows(rows_given, count);
    std::vector<Query> queries;
    queries.reserve(count * width);
    std::vector<int64_t> length = cache.length;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = rows[i], seen = length[row];
      const bool wants_delta = delta && delta->data<uint8_t>()[i];
      for (int64_t j = 0; j < width; ++j) {
        const int64_t at = i * width + j, token = ids.data<int64_t>()[at];
        if (mask && !mask->data<uint8_t>()[at]) continue;
        check(token >= 0 && token < vocabulary_, "a token is not in the vocabulary");
        const int64_t place = branches ? seen + j : length[row]++;
        check(place < cache.places, "the cache is full: give it a larger capacity");
        queries.push_back({token, row, place, branches ? seen : place, at, wants_delta});
      }
    }
    {
      const py::gil_scoped_release unlocked;
      const std::lock_guard lock(mutex_);
      for (size_t begin = 0; begin < queries.size(); begin += kQueriesPerPass) {
        run(cache, queries.data() + begin, std::min<int64_t>(kQueriesPerPass, queries.size() - begin),
            states.data<float>());
      }
    }
    cache.length = length;
    for (int64_t row : rows) cache.branch[row].assign(branches ? width : 0, false);
    for (const Query& query : queries) {
      if (branches) cache.branch[query.row][query.place - query.seen] = true;
    }
  }

  // states: float32 [rows, dim]. logits: float32 [rows, vocabulary], written to.
  void logits(py::handle states_given, int64_t top, py::handle logits_given) {
    const View states("states", states_given, View::kFloat32, {-1, model_.dim});
    const int64_t rows = states.size(0);
    const View logits("logits", logits_given, View::kFloat32, {rows, -1});
    const int64_t vocabulary = logits.size(1);
    check(head_.columns > 0, "the stack has no output layer");
    check(vocabulary >= 1 && vocabulary <= vocabulary_ && top >= 0, "the output layer has not as many tokens");
    const py::gil_scoped_release unlocked;
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
      projection.states = states.data<float>() + begin * model_.dim;
      projection.logits = logits.data<float>() + begin * vocabulary;
      const int64_t wide = padded(model_.dim), best = projection.workers * projection.rows * top;
      const int64_t phases = 3 * projection.workers;  // at most
      Layout layout;
      const int64_t x = layout.add({projection.rows, wide, size()}),
                    floats = layout.add({top > 0 && bfloat16() ? projection.rows : 0, wide, sizeof(float)}),
                    length = layout.add({projection.rows, sizeof(float)}), bests = layout.add({best, sizeof(float)}),
                    phase = layout.add({phases, sizeof(Phase)});
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
  // Inputs of a packed matrix.
  int64_t held(int64_t depth) const { return depth + (bfloat16() ? depth % 2 : 0); }
  bool bfloat16() const { return model_.dtype == Dtype::kBFloat16; }
  int64_t size() const { return bfloat16() ? 2 : 4; }

  Matrix& matrix(int64_t layer, const std::string& name) {
    if (name == "head") return head_;
    Layer& of = layers_.at(layer);
    if (name == "qkv") return of.qkv;
    if (name == "o") return of.o;
    if (name == "gate_up") return of.gate_up;
    if (name == "down") return of.down;
    throw std::runtime_error("pyargs: a layer has the matrices qkv, o, gate_up and down, not '" + name + "'");
  }

  // Where a packed matrix has a column's weight.
  template <class To>
  static int64_t place(const Matrix& matrix, int64_t column, int64_t d) {
    constexpr int64_t kPair = 4 / sizeof(To);
    return column / kPanel * kPanel * matrix.depth + (d / kPair * kPanel + column % kPanel) * kPair + d % kPair;
  }

  // Packs one panel of the rows.
  template <class To, class From>
  std::function<void(int64_t)> packer(const Matrix& matrix, int64_t offset, bool alternate, const View& weight) {
    constexpr int64_t kDepth = 64;  // a part of a panel that stays in the first-level cache
    const From* all = weight.data<From>();
    const int64_t rows = weight.size(0), depth = weight.size(1);
    const auto column = [=](int64_t n) { return offset + n + (alternate ? n / kPanel * kPanel : 0); };
    To* packed = static_cast<To*>(const_cast<void*>(matrix.weight));
    return [=, &matrix](int64_t panel) {
      for (int64_t start = 0; start < depth; start += kDepth) {
        for (int64_t n = panel * kPanel; n < std::min((panel + 1) * kPanel, rows); ++n) {
          const From* from = all + n * depth;
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

  const float* keep(const char* name, py::handle values, std::initializer_list<int64_t> shape) {
    const View view(name, values, View::kFloat32, shape);
    const auto* from = view.data<float>();
    return kept_.emplace_back(std::make_shared<std::vector<float>>(from, from + view.size()))->data();
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
    const int64_t residual = layout.add({count, padded(pass.dim), sizeof(float)}),
                  qkv = layout.add({count, layers_[0].qkv.columns, sizeof(float)}),
                  low = layout.add({count, max_rank_, sizeof(float)}),
                  scratch = layout.add({pass.workers, pass.scratch_size, sizeof(float)}),
                  x = layout.add({count, padded(pass.dim), size()}), y = layout.add({count, padded(reads), size()}),
                  phase = layout.add({phases, sizeof(Phase)});
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
  std::shared_ptr<const View> embedding_;
  Memory memory_;
  std::mutex mutex_;
};

}  // namespace stack
}  // namespace pyargs
