// Threads of a program use one stack, its twin, one cache and the kernels at the same time, and each gets what it gets
// alone on one thread, bit by bit. ../test_cxx.py builds it, `make sanitize` and `make sanitize-threads` do so with
// sanitizers.
#include <pyargs/kernels.h>
#include <pyargs/stack.h>
#include <pyargs/threads.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <list>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

using pyargs::View;

namespace {

constexpr int64_t kDim = 64, kHeads = 4, kKvHeads = 2, kHeadDim = 16, kInner = 96, kLayers = 2, kTokens = 101;
constexpr int64_t kPlaces = 40, kRows = 2, kWidth = 7, kCandidates = 5, kRank = 3, kUsers = 3;  // rows of each thread
constexpr int kSteps = 3, kCallers = 4;

struct Kind {
  const char *dtype, *format, *block;  // see pyargs::Stack; block: where weights come from a GGUF file
};

using Bytes = std::vector<uint8_t>;

// Numbers that depend on a seed alone.
class Numbers {
 public:
  explicit Numbers(uint32_t seed) : engine_(seed) {}
  uint32_t below(uint32_t limit) { return engine_() % limit; }
  float next() { return static_cast<float>(engine_() % 2001) / 1000.0f - 1.0f; }
  std::vector<float> floats(int64_t count) {
    std::vector<float> found(count);
    for (float& value : found) value = next();
    return found;
  }

 private:
  std::mt19937 engine_;
};

// What a stack is packed from, which may be forgotten afterwards; but for the embedding.
class Weights {
 public:
  explicit Weights(const Kind& kind) : kind_(kind) {}

  View vector(int64_t size) { return View(floats_.emplace_back(numbers_.floats(size)).data(), {size}); }

  View table(int64_t rows, int64_t columns) {
    return View(floats_.emplace_back(numbers_.floats(rows * columns)).data(), {rows, columns});
  }

  pyargs::Stack::Part part(const char* matrix, int64_t offset, bool alternate, int64_t rows, int64_t depth) {
    const std::string block = kind_.block;
    if (block.empty()) return {matrix, offset, alternate, table(rows, depth)};
    const int64_t size = block == "Q8_0" ? 34 : block == "Q4_1" ? 20 : 18;
    Bytes& bytes = bytes_.emplace_back(rows * depth / 32 * size);
    for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(numbers_.below(256));
    for (size_t i = 0; i < bytes.size(); i += size) {  // float16 scales and offsets of 2^-9 to 2^-6
      for (int64_t j = 1; j < (block == "Q4_1" ? 4 : 2); j += 2)
        bytes[i + j] = static_cast<uint8_t>(0x18 + bytes[i + j] % 12);
    }
    return {matrix, offset, alternate, View(bytes.data(), {rows, depth / 32 * size}), block};
  }

 private:
  Kind kind_;
  Numbers numbers_{1};
  std::list<std::vector<float>> floats_;
  std::list<Bytes> bytes_;
};

std::unique_ptr<pyargs::Stack> packed(const Kind& kind, Weights& weights) {
  const std::vector<std::string> formats(*kind.format ? 4 * kLayers + 1 : 0, kind.format);
  auto stack = std::make_unique<pyargs::Stack>(kind.dtype, kDim, kHeads, kKvHeads, kHeadDim, kInner, kLayers, kTokens,
                                               true, 1e-5f, formats);
  const int64_t keys = kHeads * kHeadDim, values = keys + kKvHeads * kHeadDim;
  for (int64_t layer = 0; layer < kLayers; ++layer) {
    stack->pack(layer,
                {weights.part("qkv", 0, false, keys, kDim), weights.part("qkv", keys, false, kKvHeads * kHeadDim, kDim),
                 weights.part("qkv", values, false, kKvHeads * kHeadDim, kDim), weights.part("o", 0, false, kDim, keys),
                 weights.part("gate_up", 0, true, kInner, kDim), weights.part("gate_up", 32, true, kInner, kDim),
                 weights.part("down", 0, false, kDim, kInner)});
    stack->norms(layer, weights.vector(kDim), weights.vector(kDim));
  }
  stack->pack(0, {weights.part("head", 0, false, kTokens, kDim)});
  stack->embedding(weights.table(kTokens, kDim), weights.vector(kDim));
  return stack;
}

// All that a thread was told, one after the other.
class Record {
 public:
  template <class T>
  void add(const T* values, int64_t count) {
    const auto* from = reinterpret_cast<const uint8_t*>(values);
    bytes_.insert(bytes_.end(), from, from + count * sizeof(T));
  }
  bool operator==(const Record&) const = default;

 private:
  Bytes bytes_;
};

// Guided steps of kRows prompts in the rows of a cache that begin at `first`.
void decode(pyargs::Stack& stack, pyargs::Cache& cache, int64_t first, uint32_t seed, bool wants_delta,
            Record& record) {
  Numbers numbers(seed);
  const std::vector<float> directions = numbers.floats(kUsers * kDim), rewards = numbers.floats(kRows * kTokens);
  const float weight[kRows] = {0.5f, 2.0f};
  const int64_t user[kRows] = {seed % kUsers, 1}, rows[kRows] = {first + 1, first}, limit[kRows] = {kSteps, kSteps};
  const bool delta[kRows] = {wants_delta, false};
  bool mask[kRows * kWidth], finished[kRows] = {};
  int64_t ids[kRows * kWidth], candidates[kRows * kCandidates];
  int64_t step[kRows] = {}, token[kRows] = {}, slot[kRows] = {};
  double chosen[kRows * pyargs::kChosen] = {};
  float so_far[kRows] = {}, logsumexp[kRows], logprobs[kRows * kCandidates], reward[kRows * kCandidates];
  for (int64_t i = 0; i < kRows * kWidth; ++i) {
    ids[i] = numbers.below(kTokens);
    mask[i] = i != kWidth;  // the second prompt is shorter
  }
  const View at(rows, {kRows}), wanting(delta, {kRows});
  const View few(directions.data(), {12, kHeadDim / 2});
  pyargs::Cache other(kLayers, kKvHeads, kHeadDim, 1, few, few);
  for (int64_t row : rows) cache.copy(other, row, 0, 0);  // what was there before is forgotten
  std::vector<float> states(kRows * kWidth * kDim), last(kRows * kDim), logits(kRows * kTokens);
  stack.forward(cache, View(ids, {kRows, kWidth}), View(mask, {kRows, kWidth}), at, wanting, false,
                View(states.data(), {kRows, kWidth, kDim}));
  record.add(states.data(), states.size());
  for (int64_t r = 0; r < kRows; ++r) {
    std::memcpy(&last[r * kDim], &states[(r * kWidth + kWidth - 1) * kDim], kDim * sizeof(float));
  }

  pyargs::ScoreRows score{};
  score.k = kCandidates;
  score.reward_weight = weight;
  score.finished = finished;
  score.features = states.data();
  score.hidden = score.features_stride_k = score.weight_stride = kDim;
  score.features_stride_b = kCandidates * kDim;
  score.weight = directions.data();
  score.weight_rows = kUsers;
  score.user = user;
  score.logprobs = logprobs;
  score.ids = candidates;
  score.logprobs_stride = score.ids_stride = kCandidates;
  score.scale = 1.0f;
  score.state.step = step;
  score.state.limit = limit;
  score.state.token = token;
  score.state.slot = slot;
  score.state.chosen = chosen;
  score.state.finished = finished;
  score.state.so_far = so_far;
  pyargs::TokenwiseRows tokenwise{};
  bool over[kRows] = {}, over_too[kRows];
  int64_t best[kRows], place[kRows];
  tokenwise.k = kCandidates;
  tokenwise.reward_weight = weight;
  tokenwise.finished = over;
  tokenwise.token = best;
  tokenwise.slot = place;
  tokenwise.reward = reward;
  tokenwise.finished_out = over_too;
  tokenwise.policy = {logits.data(), pyargs::Dtype::kFloat32, kTokens, kTokens};
  tokenwise.rewards = {rewards.data(), pyargs::Dtype::kFloat32, kTokens, kTokens};

  for (int i = 0; i < kSteps; ++i) {
    stack.logits(View(last.data(), {kRows, kDim}), kCandidates, View(logits.data(), {kRows, kTokens}));
    pyargs::cpu::topk_logprobs(tokenwise.policy, kRows, kCandidates, logprobs, candidates, logsumexp);
    pyargs::cpu::tokenwise_select(tokenwise, kRows);
    stack.forward(cache, View(candidates, {kRows, kCandidates}), {}, at, wanting, true,
                  View(states.data(), {kRows, kCandidates, kDim}));
    pyargs::cpu::score_select(score, kRows);
    record.add(candidates, kRows * kCandidates);
    record.add(logprobs, kRows * kCandidates);
    record.add(best, kRows);
    record.add(reward, kRows * kCandidates);
    record.add(states.data(), kRows * kCandidates * kDim);
    record.add(chosen, kRows * pyargs::kChosen);
    for (int64_t r = 0; r < kRows; ++r) {
      const auto from = static_cast<int64_t>(chosen[r * pyargs::kChosen + 1]);
      if (from < 0) throw std::runtime_error("a reward is not finite");
      std::memcpy(&last[r * kDim], &states[(r * kCandidates + from) * kDim], kDim * sizeof(float));
    }
    if (i + 1 < kSteps) cache.commit(View(slot, {kRows}), at);
    const std::vector<int64_t> length = cache.length();
    record.add(&length[first], kRows);
  }
  other.copy(cache, 0, first, 5);
  cache.copy(other, first, 0, 4);
  record.add(other.length().data(), 1);
}

// Sizes that several threads share.
void kernels(uint32_t seed, Record& record) {
  constexpr int64_t batch = 32, k = 8, hidden = 512, vocabulary = 100000, units = 2048, dim = 32;
  Numbers numbers(seed);
  const std::vector<float> logits = numbers.floats(kRows * vocabulary), features = numbers.floats(batch * k * hidden),
                           directions = numbers.floats(kUsers * hidden), bank = numbers.floats(kUsers * units * dim);
  std::vector<float> logprobs(kRows * k), reward(batch * k), out(kRows * k * units);
  std::vector<int64_t> ids(kRows * k), user(batch), all_ids(batch * k), token(batch), slot(batch);
  const std::vector<float> weight(batch, 1.5f), prior = numbers.floats(batch * k);
  for (int64_t& one : user) one = numbers.below(kUsers);
  for (int64_t& one : all_ids) one = numbers.below(vocabulary);
  float logsumexp[kRows];
  bool finished[batch] = {}, over[batch];
  pyargs::cpu::topk_logprobs({logits.data(), pyargs::Dtype::kFloat32, vocabulary, vocabulary}, kRows, k,
                             logprobs.data(), ids.data(), logsumexp);
  record.add(logprobs.data(), logprobs.size());
  record.add(ids.data(), ids.size());

  pyargs::ScoreRows score{};
  score.k = k;
  score.reward_weight = weight.data();
  score.finished = finished;
  score.token = token.data();
  score.slot = slot.data();
  score.reward = reward.data();
  score.finished_out = over;
  score.features = features.data();
  score.hidden = score.features_stride_k = score.weight_stride = hidden;
  score.features_stride_b = k * hidden;
  score.weight = directions.data();
  score.weight_rows = kUsers;
  score.user = user.data();
  score.ids = all_ids.data();
  score.logprobs = prior.data();
  score.logprobs_stride = score.ids_stride = k;
  score.scale = 0.1f;
  pyargs::cpu::score_select(score, batch);
  record.add(token.data(), batch);
  record.add(reward.data(), batch * k);

  pyargs::TokenwiseRows tokenwise{};
  static_cast<pyargs::ChoiceRows&>(tokenwise) = score;
  tokenwise.policy = tokenwise.rewards = {logits.data(), pyargs::Dtype::kFloat32, vocabulary, vocabulary};
  pyargs::cpu::tokenwise_select(tokenwise, kRows);
  record.add(token.data(), kRows);

  pyargs::UserMlpRows mlp{};
  mlp.hidden = features.data();
  mlp.bank = bank.data();
  mlp.hidden_stride_k = mlp.bank_stride_h = mlp.dim = dim;
  mlp.hidden_stride_b = k * dim;
  mlp.bank_stride_u = units * dim;
  mlp.k = k;
  mlp.units = units;
  mlp.users = kUsers;
  mlp.user = user.data();
  mlp.out = out.data();
  pyargs::cpu::user_mlp(mlp, kRows);
  record.add(out.data(), out.size());
}

// What each caller is told: one after the other, or all at once.
template <class Call>
std::vector<Record> called(const Call& call, bool at_once) {
  std::vector<Record> records(kCallers);
  std::vector<std::string> errors(kCallers);
  std::vector<std::thread> threads;
  for (int caller = 0; caller < kCallers; ++caller) {
    const auto work = [&, caller] {
      try {
        call(caller, records[caller]);
      } catch (const std::exception& error) {
        errors[caller] = error.what();
      }
    };
    if (at_once) {
      threads.emplace_back(work);
    } else {
      work();
    }
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& error : errors) {
    if (!error.empty()) throw std::runtime_error(error);
  }
  return records;
}

template <class Call>
void check(const std::string& name, const Call& call) {
  pyargs::set_thread_count(1);
  const std::vector<Record> alone = called(call, false);
  if (alone[0] == alone[2]) throw std::runtime_error(name + ": callers who ask otherwise were told the same");
  for (int64_t threads : {1, 2, 5}) {
    pyargs::set_thread_count(threads);
    for (bool at_once : {false, true}) {
      if (called(call, at_once) == alone) continue;
      throw std::runtime_error(name + ": " + std::to_string(threads) + " threads change what a caller is told");
    }
  }
}

void check_stack(const Kind& kind) {
  Weights weights(kind);
  const std::unique_ptr<pyargs::Stack> stack = packed(kind, weights), twin = stack->twin();
  const int64_t outputs = (kHeads + 2 * kKvHeads) * kHeadDim;
  twin->delta(1, "qkv", weights.table(kRank, kDim),
              View(weights.vector(outputs * kRank).data, View::kFloat32, {outputs / 32, kRank, 32}));
  const View turns = weights.table(kPlaces, kHeadDim / 2);
  pyargs::Cache cache(kLayers, kKvHeads, kHeadDim, kRows * kCallers, turns, turns);
  check(std::string(kind.dtype) + " " + kind.block, [&](int caller, Record& record) {
    const bool odd = caller % 2 == 1;
    decode(odd ? *twin : *stack, cache, caller * kRows, caller, odd, record);
  });
}

// A machine that gives no more threads: an error, after which fewer do the work.
void check_limit() {
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // these need memory of their own
  Record before, after;
  pyargs::set_thread_count(2);
  kernels(0, before);
  long pages = 0;
  std::FILE* used = std::fopen("/proc/self/statm", "r");
  if (!used || std::fscanf(used, "%ld", &pages) != 1) throw std::runtime_error("/proc/self/statm cannot be read");
  std::fclose(used);
  rlimit usual;
  getrlimit(RLIMIT_AS, &usual);
  const rlimit little{static_cast<rlim_t>(pages * sysconf(_SC_PAGESIZE) + (100 << 20)), usual.rlim_max};
  setrlimit(RLIMIT_AS, &little);
  pyargs::set_thread_count(200);
  try {
    Record record;
    kernels(0, record);
  } catch (const std::runtime_error& error) {
    std::printf("200 threads: refused, %s\n", error.what());
  }
  setrlimit(RLIMIT_AS, &usual);
  pyargs::set_thread_count(2);
  kernels(0, after);
  if (!(before == after)) throw std::runtime_error("threads that were refused change what comes later");
#endif
}

}  // namespace

int main() try {
  for (const char* capability : {"default", "dotprod", "avx2", "avx512", "avx512_vnni", "avx512_bf16"}) {
    try {
      pyargs::set_cpu_capability(capability);
    } catch (const std::invalid_argument& error) {
      std::printf("%s: skipped, %s\n", capability, error.what());
      continue;
    }
    check("kernels", [](int caller, Record& record) { kernels(caller, record); });
    for (const Kind& kind :
         {Kind{"float32", "", ""}, Kind{"bfloat16", "", ""}, Kind{"int8", "", ""}, Kind{"float32", "int8", "Q8_0"},
          Kind{"float32", "int4", "Q4_0"}, Kind{"float32", "int4", "Q4_1"}}) {
      check_stack(kind);
    }
    std::printf("%s: passed\n", capability);
  }
  check_limit();
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "threads: %s\n", error.what());
  return 1;
}
