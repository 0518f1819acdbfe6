// A decoder stack: packing its weights, and the threads of a pass. Baseline only. Nothing that Python can pass does
// more than raise; pyargs/lm/stack/run.py turns the errors into its own.
#include "../include/pyargs/stack.h"

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
#include "../parallel.h"
#include "cache.h"
#include "check.h"
#include "memory.h"
#include "packing.h"
#include "pass.h"

namespace pyargs {

#define PYARGS_DECLARE(capability)                        \
  namespace capability {                                  \
  void run_pass(const stack::Pass&, int64_t);             \
  void run_projection(const stack::Projection&, int64_t); \
  }
PYARGS_DECLARE(baseline)
PYARGS_DECLARE(avx2)
PYARGS_DECLARE(avx512)
PYARGS_DECLARE(avx512_vnni)
PYARGS_DECLARE(avx512_bf16)
PYARGS_DECLARE(dotprod)
#undef PYARGS_DECLARE

// Calls a function of pass.cpp as it is compiled for this machine.
#if defined(PYARGS_ARM) && PYARGS_BEST >= 1
#define PYARGS_CASES_PASS(function, ...) \
  case Capability::kDotprod:             \
    return dotprod::function(__VA_ARGS__);
#elif PYARGS_BEST >= 4
#define PYARGS_CASES_PASS(function, ...)       \
  case Capability::kAvx512Bf16:                \
    return avx512_bf16::function(__VA_ARGS__); \
  case Capability::kAvx512Vnni:                \
    return avx512_vnni::function(__VA_ARGS__);
#elif PYARGS_BEST == 3
#define PYARGS_CASES_PASS(function, ...) \
  case Capability::kAvx512Vnni:          \
    return avx512_vnni::function(__VA_ARGS__);
#else
#define PYARGS_CASES_PASS(function, ...)
#endif
#define PYARGS_DISPATCH_PASS(function, ...)   \
  switch (cpu_capability()) {                 \
    PYARGS_CASES_PASS(function, __VA_ARGS__)  \
    default:                                  \
      PYARGS_DISPATCH(function, __VA_ARGS__); \
  }

using namespace stack;

namespace {

constexpr int64_t kMostLayers = 1 << 16;

std::optional<Block> block_named(const std::string& name) {
  if (name.empty()) return std::nullopt;
  if (name == "Q4_0") return Block::kQ4_0;
  if (name == "Q4_1") return Block::kQ4_1;
  if (name == "Q8_0") return Block::kQ8_0;
  throw std::runtime_error("pyargs: blocks are Q4_0, Q4_1 or Q8_0, not '" + name + "'");
}

}  // namespace

struct Stack::State {
  explicit State(int64_t vocabulary) : vocabulary(vocabulary), weights(std::make_shared<Memory>()) {}

  State(const State& other)
      : model(other.model),
        layers(other.layers),
        head(other.head),
        screen(other.screen),
        screened(other.screened),
        vocabulary(other.vocabulary),
        max_rank(other.max_rank),
        weights(other.weights),
        kept(other.kept),
        embedding(other.embedding) {
    model.layer = layers.data();
  }

  // Inputs of a packed matrix.
  static int64_t held(Format format, int64_t depth) {
    return format == Format::kFloat32 ? depth : format == Format::kBFloat16 ? depth + depth % 2 : padded(depth);
  }
  bool bfloat16() const { return model.inputs == Format::kBFloat16; }

  Matrix& matrix(int64_t layer, const std::string& name) {
    if (name == "head") return head;
    Layer& of = layers.at(layer);
    if (name == "qkv") return of.qkv;
    if (name == "o") return of.o;
    if (name == "gate_up") return of.gate_up;
    if (name == "down") return of.down;
    throw std::runtime_error("pyargs: a layer has the matrices qkv, o, gate_up and down, not '" + name + "'");
  }

  const float* keep(const char* name, const View& values, std::initializer_list<int64_t> shape) {
    const auto* from = require(name, values, View::kFloat32, shape).as<const float>();
    return kept.emplace_back(std::make_shared<std::vector<float>>(from, from + values.size()))->data();
  }

  static Phase* zeroed(char* memory, int64_t count) {
    std::memset(memory, 0, count * sizeof(Phase));
    return reinterpret_cast<Phase*>(memory);
  }

  void run(const Cache::State& cache, const Query* queries, int64_t count, float* states) {
    Pass pass = model;
    pass.workers = thread_count();
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
                  qkv = layout.add({count, layers[0].qkv.columns, sizeof(float)}),
                  low = layout.add({count, max_rank, sizeof(float)}),
                  scratch = layout.add({pass.workers, pass.scratch_size, sizeof(float)}),
                  x = layout.add({count, row_bytes(pass.inputs, padded(pass.dim))}),
                  y = layout.add({count, row_bytes(pass.inputs, padded(reads))}),
                  phase = layout.add({phases, sizeof(Phase)});
    char* data = memory.reserve(layout);
    pass.residual = reinterpret_cast<float*>(data + residual);
    pass.qkv = reinterpret_cast<float*>(data + qkv);
    pass.low = reinterpret_cast<float*>(data + low);
    pass.scratch = reinterpret_cast<float*>(data + scratch);
    pass.x = data + x;
    pass.y = data + y;
    pass.phase = zeroed(data + phase, phases);
    in_parallel(pass.workers, [&pass](int64_t worker) { PYARGS_DISPATCH_PASS(run_pass, pass, worker); });
  }

  Pass model{};
  std::vector<Layer> layers;
  Matrix head{};
  Screen screen{};
  bool screened = false;  // the head
  int64_t vocabulary, max_rank = 0;
  std::shared_ptr<Memory> weights;
  std::vector<std::shared_ptr<const std::vector<float>>> kept;  // biases, norms, deltas
  std::shared_ptr<const void> embedding;
  Memory memory;
  std::mutex mutex;
};

Stack::Stack(const std::string& dtype, int64_t dim, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t inner,
             int64_t layers, int64_t vocabulary, bool unembedding, float epsilon,
             const std::vector<std::string>& formats)
    : state_(std::make_unique<State>(vocabulary)) {
  State& s = *state_;
  constexpr const char* kFormats[] = {"float32", "bfloat16", "int8", "int4"};
  const auto format_named = [&](const std::string& name) {
    const auto* found = std::find(std::begin(kFormats), std::end(kFormats), name);
    check(found != std::end(kFormats), "weights are packed as float32, bfloat16, int8 or int4");
    return static_cast<Format>(found - kFormats);
  };
  s.model.inputs = format_named(dtype);
  check(s.model.inputs != Format::kInt4, "weights are multiplied with float32, bfloat16 or int8");
  for (int64_t size : {dim, heads, kv_heads, head_dim, inner, layers, vocabulary}) {
    check(size >= 1 && size <= kLargest, "the sizes of a stack must be positive numbers");
  }
  check(product_of({heads + 2 * kv_heads, head_dim}) <= kLargest, "the heads of a stack are too large");
  check(heads % kv_heads == 0, "heads must be a multiple of kv_heads");
  check(head_dim % 2 == 0, "head_dim must be even");
  check(layers <= kMostLayers, "a stack has at most 65536 layers");
  check(formats.empty() || static_cast<int64_t>(formats.size()) == 4 * layers + 1,
        "a stack has the formats of four matrices for each layer, and of the head");
  Layer usual{};
  usual.attention_scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  usual.residual_scale = 1.0f;
  usual.rotary = true;
  s.layers.resize(layers, usual);
  s.model.dim = dim;
  s.model.heads = heads;
  s.model.kv_heads = kv_heads;
  s.model.head_dim = head_dim;
  s.model.inner = inner;
  s.model.layers = layers;
  s.model.epsilon = epsilon;
  s.model.embedding_scale = 1.0f;
  s.model.layer = s.layers.data();
  Layout layout;
  std::vector<std::pair<Matrix*, int64_t>> places;
  const auto add = [&](Matrix& matrix, int64_t columns, int64_t depth) {
    matrix.format = formats.empty() ? s.model.inputs : format_named(formats[places.size()]);
    const bool grouped = matrix.format == Format::kInt8 || matrix.format == Format::kInt4;
    check(matrix.format == s.model.inputs || (s.model.inputs == Format::kFloat32 && grouped),
          "weights of this format are not multiplied with inputs of that dtype");
    check(s.model.inputs == Format::kInt8 || !grouped || depth % kGroup == 0,
          "the weights of an output come in blocks of 32");
    matrix.columns = columns;
    matrix.depth = s.held(matrix.format, depth);
    places.emplace_back(&matrix, layout.add({columns / kPanel, panel_bytes(matrix.format, matrix.depth)}));
  };
  for (Layer& layer : s.layers) {
    add(layer.qkv, padded((heads + 2 * kv_heads) * head_dim), dim);
    add(layer.o, padded(dim), heads * head_dim);
    add(layer.gate_up, 2 * padded(inner), dim);
    add(layer.down, padded(dim), inner);
  }
  add(s.head, unembedding ? padded(vocabulary) : 0, dim);
  s.screened = s.head.format == Format::kFloat32 || s.head.format == Format::kBFloat16;
  const int64_t panels = layout.add({s.screened ? s.head.columns / kPanel : 0, padded(dim) / kGroup, kGroupBytes});
  const int64_t error = layout.add({s.head.columns, sizeof(float)});
  char* data = s.weights->reserve(layout);
  s.screen = {data + panels, reinterpret_cast<float*>(data + error)};
  for (auto [matrix, at] : places) matrix->weight = data + at;
}

Stack::Stack(std::unique_ptr<State> state) : state_(std::move(state)) {}

Stack::~Stack() = default;

std::unique_ptr<Stack> Stack::twin() const {
  return std::unique_ptr<Stack>(new Stack(std::make_unique<State>(*state_)));
}

// All parts of a layer at once: a parallel region waits for every thread, and another process may have its core.
void Stack::pack(int64_t layer, const std::vector<Part>& parts) {
  State& s = *state_;
  struct Task {
    const Part& part;
    const Matrix& to;
    std::optional<Block> block;
    int64_t panel;
  };
  std::vector<Task> tasks;
  for (const Part& part : parts) {
    const View& weight = part.weight;
    const Matrix& to = s.matrix(layer, part.matrix);
    const std::optional<Block> block = block_named(part.block);
    require("weight", weight, block ? View::kUInt8 : View::kWeight, {-1, -1});
    const int64_t rows = weight.size(0), offset = part.offset;
    const int64_t depth = block ? weight.size(1) / block_bytes(*block) * kGroup : weight.size(1);
    check(!block || format_of(*block) == to.format, "these blocks are not of the format of their matrix");
    check(block || to.format != Format::kInt4, "int4 weights come in blocks");
    check(block || to.format != Format::kInt8 || s.model.inputs == Format::kInt8,
          "int8 weights for float32 inputs come in blocks");
    check(rows >= 1 && s.held(to.format, depth) == to.depth &&
              (!block || weight.size(1) == to.depth / kGroup * block_bytes(*block)),
          "a weight has not as many inputs as its matrix");
    check(offset >= 0 && offset < to.columns &&
              offset + rows + (part.alternate ? (rows - 1) / kPanel * kPanel : 0) <= to.columns,
          "a weight has more outputs than its matrix");
    check(&to != &s.head || (offset == 0 && !part.alternate && rows == s.vocabulary),
          "the output layer needs a row for each token");
    for (int64_t panel = 0; panel * kPanel < rows; ++panel) tasks.push_back({part, to, block, panel});
  }
  in_parallel(tasks.size(), [&](int64_t i) {
    const auto& [part, to, block, panel] = tasks[i];
    pack_panel(to, part.offset, part.alternate, part.weight, block, panel);
    if (&to == &s.head && s.screened) make_screen(s.head, s.screen, s.model.dim, panel);
  });
}

void Stack::bias(int64_t layer, const std::string& name, const View& values) {
  Matrix& matrix = state_->matrix(layer, name);
  matrix.bias = state_->keep("bias", values, {matrix.columns});
}

void Stack::delta(int64_t layer, const std::string& name, const View& a, const View& b) {
  State& s = *state_;
  Matrix& matrix = s.matrix(layer, name);
  check(&matrix != &s.head, "the output layer has no delta");
  check(matrix.rank == 0, "a stack has one delta");
  const int64_t rank = require("a", a, View::kFloat32, {-1, matrix.depth}).size(0);
  const float* first = s.keep("a", a, {rank, matrix.depth});
  matrix.b = s.keep("b", b, {matrix.columns / kPanel, rank, kPanel});
  matrix.a = first;
  matrix.rank = rank;
  s.max_rank = std::max(s.max_rank, rank);
}

void Stack::norms(int64_t layer, const View& attention, const View& mlp) {
  State& s = *state_;
  s.layers.at(layer).attention_norm = s.keep("attention norm", attention, {s.model.dim});
  s.layers.at(layer).mlp_norm = s.keep("mlp norm", mlp, {s.model.dim});
}

void Stack::head_norms(int64_t layer, const View& queries, const View& keys) {
  State& s = *state_;
  s.layers.at(layer).q_norm = s.keep("norm of queries", queries, {s.model.head_dim});
  s.layers.at(layer).k_norm = s.keep("norm of keys", keys, {s.model.head_dim});
}

void Stack::attention(int64_t layer, float scale, float residual_scale, bool rotary) {
  Layer& of = state_->layers.at(layer);
  of.attention_scale = scale;
  of.residual_scale = residual_scale;
  of.rotary = rotary;
}

void Stack::embedding(const View& embedding, const View& norm, std::shared_ptr<const void> owner, float scale) {
  State& s = *state_;
  require("embedding", embedding, View::kWeight, {s.vocabulary, s.model.dim});
  s.model.norm = s.keep("norm", norm, {s.model.dim});
  s.embedding = std::move(owner);
  s.model.embedding = embedding.data;
  s.model.embedding_scale = scale;
  s.model.embedding_dtype = embedding.type == View::kBFloat16 ? Dtype::kBFloat16 : Dtype::kFloat32;
}

void Stack::forward(Cache& cache_given, const View& ids, const std::optional<View>& mask,
                    const std::optional<View>& rows_given, const std::optional<View>& delta, bool branches,
                    const View& states) {
  State& s = *state_;
  Cache::State& cache = *cache_given.state_;
  require("ids", ids, View::kInt64, {-1, -1});
  const int64_t count = ids.size(0), width = ids.size(1);
  require("states", states, View::kFloat32, {count, width, s.model.dim});
  if (mask) require("mask", *mask, View::kBool, {count, width});
  if (delta) require("delta", *delta, View::kBool, {count});
  check(cache.layers == s.model.layers && cache.kv_heads == s.model.kv_heads && cache.head_dim == s.model.head_dim,
        "the cache belongs to a stack of other sizes");
  check(s.model.embedding && std::all_of(s.layers.begin(), s.layers.end(), [](const Layer& l) { return l.mlp_norm; }),
        "the stack is not packed yet");
  std::unique_lock noting(cache.mutex);
  const std::vector<int64_t> rows = cache.checked_rows(rows_given, count);
  std::vector<Query> queries;
  queries.reserve(count * width);
  std::vector<int64_t> length = cache.length;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = rows[i], seen = length[row];
    const bool wants_delta = delta && delta->as<const uint8_t>()[i];
    for (int64_t j = 0; j < width; ++j) {
      const int64_t at = i * width + j, token = ids.as<const int64_t>()[at];
      if (mask && !mask->as<const uint8_t>()[at]) continue;
      check(token >= 0 && token < s.vocabulary, "a token is not in the vocabulary");
      const int64_t place = branches ? seen + j : length[row]++;
      check(place < cache.places, "the cache is full: give it a larger capacity");
      queries.push_back({token, row, place, branches ? seen : place, at, wants_delta});
    }
  }
  noting.unlock();
  {
    const std::lock_guard lock(s.mutex);
    for (size_t begin = 0; begin < queries.size(); begin += kQueriesPerPass) {
      s.run(cache, queries.data() + begin, std::min<int64_t>(kQueriesPerPass, queries.size() - begin),
            states.as<float>());
    }
  }
  noting.lock();
  for (int64_t row : rows) {
    cache.length[row] = length[row];
    cache.branch[row].assign(branches ? width : 0, false);
  }
  for (const Query& query : queries) {
    if (branches) cache.branch[query.row][query.place - query.seen] = true;
  }
}

void Stack::logits(const View& states, int64_t top, const View& logits) {
  State& s = *state_;
  const int64_t rows = require("states", states, View::kFloat32, {-1, s.model.dim}).size(0);
  const int64_t vocabulary = require("logits", logits, View::kFloat32, {rows, -1}).size(1);
  check(s.head.columns > 0, "the stack has no output layer");
  check(vocabulary >= 1 && vocabulary <= s.vocabulary && top >= 0, "the output layer has not as many tokens");
  const std::lock_guard lock(s.mutex);
  if (rows > (s.bfloat16() ? kScreenRows16 : kScreenRows) || top > std::min(kTop, vocabulary) || s.head.bias ||
      !s.screened) {
    top = 0;
  }
  for (int64_t begin = 0; begin < rows; begin += kQueriesPerPass) {
    Projection projection{};
    projection.inputs = s.model.inputs;
    projection.matrix = s.head;
    projection.matrix.columns = padded(vocabulary);
    projection.screen = s.screen;
    projection.rows = std::min(kQueriesPerPass, rows - begin);
    projection.dim = s.model.dim;
    projection.vocabulary = vocabulary;
    projection.top = top;
    projection.workers = thread_count();
    projection.states = states.as<const float>() + begin * s.model.dim;
    projection.logits = logits.as<float>() + begin * vocabulary;
    const int64_t wide = padded(s.model.dim), best = projection.workers * projection.rows * top;
    const int64_t phases = 3 * projection.workers;  // at most
    Layout layout;
    const int64_t x = layout.add({projection.rows, row_bytes(projection.inputs, wide)}),
                  floats = layout.add({top > 0 && s.bfloat16() ? projection.rows : 0, wide, sizeof(float)}),
                  length = layout.add({projection.rows, sizeof(float)}), bests = layout.add({best, sizeof(float)}),
                  phase = layout.add({phases, sizeof(Phase)});
    char* data = s.memory.reserve(layout);
    projection.x = data + x;
    projection.floats = reinterpret_cast<float*>(data + floats);
    projection.length = reinterpret_cast<float*>(data + length);
    projection.best = reinterpret_cast<float*>(data + bests);
    std::fill_n(projection.best, best, -std::numeric_limits<float>::infinity());
    projection.phase = s.zeroed(data + phase, phases);
    in_parallel(projection.workers,
                [&projection](int64_t worker) { PYARGS_DISPATCH_PASS(run_projection, projection, worker); });
  }
}

}  // namespace pyargs
