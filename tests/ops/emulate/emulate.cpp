// The fibers behind cuda_runtime.h, and the kernels' host functions for ctypes (tests/ops/emulated.py builds and calls
// this).

#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "kernels/cuda/launch.h"

namespace pyargs::emulate {
namespace {

constexpr size_t kStack = 64 * 1024;

struct Barrier {
  unsigned arrived = 0;
  uint64_t generation = 0;

  bool arrive(unsigned expected) {  // true for the last, who lets the others go
    if (++arrived < expected) return false;
    arrived = 0;
    ++generation;
    return true;
  }
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 index;
  bool done = false;
  const Barrier* waits = nullptr;
  uint64_t generation = 0;  // of that barrier when the wait began

  bool ready() const { return !done && (waits == nullptr || waits->generation != generation); }
};

struct Warp {
  Barrier barrier;
  uint64_t values[32];
};

ucontext_t scheduler;
std::vector<std::unique_ptr<Thread>> threads;
std::vector<Warp> warps;
Barrier block;
unsigned alive = 0;
Thread* current = nullptr;
const std::function<void()>* body = nullptr;
std::mt19937_64 order(0);
bool shuffled = false;
std::string error;

void wait(Barrier& barrier, unsigned expected) {
  current->waits = &barrier;
  current->generation = barrier.generation;
  if (!barrier.arrive(expected)) swapcontext(&current->context, &scheduler);
  current->waits = nullptr;
}

void run_thread() {
  (*body)();
  current->done = true;
  --alive;
  if (block.arrived > 0 && block.arrived == alive) {  // those who wait need not wait for a thread that has ended
    block.arrived = 0;
    ++block.generation;
  }
  swapcontext(&current->context, &scheduler);
}

std::vector<unsigned> in_order(unsigned count) {
  std::vector<unsigned> found(count);
  std::iota(found.begin(), found.end(), 0u);
  if (shuffled) std::shuffle(found.begin(), found.end(), order);
  return found;
}

void run_block(dim3 index, dim3 size) {
  const unsigned count = size.x * size.y * size.z;
  while (threads.size() < count) threads.push_back(std::make_unique<Thread>());
  warps.assign((count + 31) / 32, Warp{});
  for (Warp& warp : warps) std::fill_n(warp.values, 32, 0xdeadbeefdeadbeefull);
  block = Barrier{};
  alive = count;
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = *threads[i];
    thread.index = dim3(i % size.x, i / size.x % size.y, i / (size.x * size.y));
    thread.done = false;
    thread.waits = nullptr;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_thread, 0);
  }
  blockIdx = index;
  while (alive > 0) {
    bool moved = false;
    for (unsigned i : in_order(count)) {
      Thread& thread = *threads[i];
      if (!thread.ready()) continue;
      moved = true;
      current = &thread;
      threadIdx = thread.index;
      swapcontext(&scheduler, &thread.context);
    }
    if (!moved) {
      error = "emulation: threads of a block wait at different barriers";
      return;
    }
  }
}

}  // namespace

void wait_for_block() { wait(block, alive); }

void wait_for_warp(uint32_t mask) {
  wait(warps[threadIdx.x / 32].barrier, static_cast<unsigned>(__builtin_popcount(mask)));
}

const uint64_t* exchange(uint32_t mask, uint64_t own) {
  Warp& warp = warps[threadIdx.x / 32];
  warp.values[lane()] = own;
  wait_for_warp(mask);
  return warp.values;
}

void launch(dim3 blocks, dim3 size, const std::function<void()>& kernel) {
  body = &kernel;
  blockDim = size;
  gridDim = blocks;
  for (unsigned i : in_order(blocks.x * blocks.y * blocks.z)) {
    if (!error.empty()) return;
    run_block(dim3(i % blocks.x, i / blocks.x % blocks.y, i / (blocks.x * blocks.y)), size);
  }
}

cudaError_t last_error() { return error.empty() ? cudaSuccess : 1; }

const char* error_text() {
  static std::string text;
  text.swap(error);
  error.clear();
  return text.c_str();
}

}  // namespace pyargs::emulate

extern "C" {

// 0: threads and blocks in order; else shuffled by this seed.
void pyargs_emulate_order(uint64_t seed) {
  pyargs::emulate::shuffled = seed != 0;
  pyargs::emulate::order.seed(seed);
}

// The functions of launch.h, with a workspace of garbage as a device would give one.
const char* pyargs_emulate_topk_logprobs(const void* logits, int64_t dtype, int64_t batch, int64_t vocab,
                                         int64_t row_stride, int64_t k, float* logprobs, int64_t* ids,
                                         float* logsumexp) {
  const size_t bytes = pyargs::cuda::topk_workspace_bytes(batch, vocab);
  std::vector<uint64_t> workspace(bytes / 8 + 1, 0xdeadbeefdeadbeefull);
  return pyargs::cuda::topk_logprobs(logits, static_cast<pyargs::Dtype>(dtype), batch, vocab, row_stride,
                                     static_cast<int>(k), logprobs, ids, logsumexp, workspace.data(), 0, nullptr);
}

const char* pyargs_emulate_score_select(
    const void* features, const void* weight, const void* bias, int64_t features_dtype, int64_t weight_dtype,
    int64_t bias_dtype, int64_t features_stride_b, int64_t features_stride_k, int64_t weight_stride,
    int64_t bias_stride, int64_t batch, int64_t k, int64_t hidden, int64_t weight_rows, int64_t bias_rows,
    const int64_t* user, const int64_t* ids, const int64_t* stop, int64_t stops, int64_t stop_stride,
    const float* reward_weight, const float* logprobs, const float* stop_reward, const float* uniform,
    const int64_t* count, const float* row_temperature, double temperature, const bool* finished, int64_t pad_id,
    int64_t activation, double scale, int64_t* token, int64_t* slot, float* reward, bool* finished_out) {
  pyargs::ScoreRows rows{};
  rows.features = features, rows.weight = weight, rows.bias = bias;
  rows.features_dtype = static_cast<pyargs::Dtype>(features_dtype);
  rows.weight_dtype = static_cast<pyargs::Dtype>(weight_dtype);
  rows.bias_dtype = static_cast<pyargs::Dtype>(bias_dtype);
  rows.features_stride_b = features_stride_b, rows.features_stride_k = features_stride_k;
  rows.weight_stride = weight_stride, rows.bias_stride = bias_stride;
  rows.k = k, rows.hidden = hidden, rows.weight_rows = weight_rows, rows.bias_rows = bias_rows;
  rows.user = user, rows.ids = ids, rows.stop = stop, rows.stops = stops;
  rows.reward_weight = reward_weight, rows.logprobs = logprobs, rows.stop_reward = stop_reward, rows.uniform = uniform;
  rows.stop_stride = stop_stride, rows.count = count, rows.row_temperature = row_temperature;
  rows.finished = finished, rows.pad_id = pad_id;
  rows.activation = static_cast<pyargs::Activation>(activation);
  rows.scale = static_cast<float>(scale), rows.temperature = temperature;
  rows.token = token, rows.slot = slot, rows.reward = reward, rows.finished_out = finished_out;
  return pyargs::cuda::score_select(rows, batch, 0, nullptr);
}

const char* pyargs_emulate_tokenwise_select(const void* policy, const void* rewards, int64_t policy_dtype,
                                            int64_t rewards_dtype, int64_t policy_stride, int64_t rewards_stride,
                                            int64_t batch, int64_t vocab, int64_t k, const float* reward_weight,
                                            const bool* finished, const int64_t* stop, int64_t stops,
                                            int64_t stop_stride, int64_t pad_id, const float* uniform,
                                            const int64_t* count, const float* row_temperature, double temperature,
                                            int64_t* token, int64_t* slot, float* reward, bool* finished_out) {
  pyargs::TokenwiseRows rows{};
  rows.policy = {policy, static_cast<pyargs::Dtype>(policy_dtype), vocab, policy_stride};
  rows.rewards = {rewards, static_cast<pyargs::Dtype>(rewards_dtype), vocab, rewards_stride};
  rows.k = k, rows.reward_weight = reward_weight, rows.finished = finished, rows.stop = stop, rows.stops = stops;
  rows.stop_stride = stop_stride, rows.count = count, rows.row_temperature = row_temperature;
  rows.pad_id = pad_id, rows.uniform = uniform, rows.temperature = temperature;
  rows.token = token, rows.slot = slot, rows.reward = reward, rows.finished_out = finished_out;
  std::vector<uint64_t> workspace(pyargs::cuda::topk_workspace_bytes(2 * batch, vocab) / 8 + 1, 0xdeadbeefdeadbeefull);
  return pyargs::cuda::tokenwise_select(rows, batch, workspace.data(), 0, nullptr);
}

const char* pyargs_emulate_user_mlp(const void* hidden, const void* bank, int64_t hidden_dtype, int64_t bank_dtype,
                                    int64_t hidden_stride_b, int64_t hidden_stride_k, int64_t bank_stride_u,
                                    int64_t bank_stride_h, int64_t batch, int64_t k, int64_t dim, int64_t units,
                                    int64_t users, const int64_t* user, float* out) {
  pyargs::UserMlpRows rows{};
  rows.hidden = hidden, rows.bank = bank;
  rows.hidden_dtype = static_cast<pyargs::Dtype>(hidden_dtype);
  rows.bank_dtype = static_cast<pyargs::Dtype>(bank_dtype);
  rows.hidden_stride_b = hidden_stride_b, rows.hidden_stride_k = hidden_stride_k;
  rows.bank_stride_u = bank_stride_u, rows.bank_stride_h = bank_stride_h;
  rows.k = k, rows.dim = dim, rows.units = units, rows.users = users, rows.user = user, rows.out = out;
  return pyargs::cuda::user_mlp(rows, batch, 0, nullptr);
}

// states: the addresses of `count` tensors.
const char* pyargs_emulate_commit(const int64_t* states, int64_t count, int64_t batch, int64_t heads, int64_t capacity,
                                  int64_t stride_b, int64_t stride_h, int64_t stride_t, int64_t bytes,
                                  const int64_t* slot, const int64_t* length) {
  pyargs::CommitRows rows{};
  for (; rows.count < count; ++rows.count) rows.states[rows.count] = reinterpret_cast<void*>(states[rows.count]);
  rows.batch = batch, rows.heads = heads;
  rows.stride_b = stride_b, rows.stride_h = stride_h, rows.stride_t = stride_t, rows.bytes = bytes;
  rows.slot = slot, rows.length = length;
  return pyargs::cuda::commit(rows, capacity, 0, nullptr);
}

}  // extern "C"
