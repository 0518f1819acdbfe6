// The kernels' host functions for ctypes: tests/emulated.py builds and calls them.

#include <algorithm>
#include <numeric>
#include <random>

#include "cuda_runtime.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/tickets.h"

namespace pyargs::emulate {

static std::mt19937_64 order(0);
static bool shuffled = false;

std::vector<unsigned> in_order(unsigned count) {
  std::vector<unsigned> found(count);
  std::iota(found.begin(), found.end(), 0u);
  if (shuffled) std::shuffle(found.begin(), found.end(), order);
  return found;
}

}  // namespace pyargs::emulate

// The fields of pyargs/ops/row_state.py in their order, and sizes.
static void set_state(pyargs::ChoiceRows& rows, const float* reward_weight, bool* finished, int64_t* step,
                      const int64_t* limit, int64_t* token, int64_t* slot, double* chosen, const int64_t* stop,
                      float* so_far, float* total, const float* temperature, const float* noise, const int64_t* own_k,
                      const double* top_p, const double* min_p, const int64_t* count, int64_t stops,
                      int64_t stop_stride, int64_t noises, int64_t pad_id) {
  rows.reward_weight = reward_weight, rows.finished = finished, rows.stop = stop, rows.count = count;
  rows.stops = stops, rows.stop_stride = stop_stride, rows.pad_id = pad_id, rows.row_temperature = temperature;
  pyargs::RowState& state = rows.state;
  state.step = step, state.limit = limit, state.token = token, state.slot = slot, state.chosen = chosen;
  state.finished = finished, state.so_far = so_far, state.total = total;
  state.noise = noise, state.noises = noises, state.own_k = own_k, state.top_p = top_p, state.min_p = min_p;
}

// With a workspace of garbage, as a device would give one.
static const char* run(const pyargs::TokenwiseRows& rows, int64_t batch) {
  const size_t bytes = pyargs::cuda::topk_workspace_bytes(2 * batch, rows.policy.vocab);
  std::vector<uint64_t> workspace(bytes / 8 + 1, 0xdeadbeefdeadbeefull);
  return pyargs::cuda::tokenwise_select(rows, batch, workspace.data(), pyargs::emulate::stream.device, nullptr);
}

// Alone, or behind the matrices of a bank, which then has the features of its own size.
static const char* run(pyargs::ScoreRows rows, int64_t batch, const void* bank, int64_t dtype, int64_t stride_u,
                       int64_t stride_h, int64_t units, int64_t users) {
  if (!bank) return pyargs::cuda::score_select(rows, batch, 0, nullptr);
  pyargs::UserMlpRows first{};
  first.hidden = rows.features, first.hidden_dtype = rows.features_dtype;
  first.hidden_stride_b = rows.features_stride_b, first.hidden_stride_k = rows.features_stride_k;
  first.bank = bank, first.bank_dtype = static_cast<pyargs::Dtype>(dtype);
  first.bank_stride_u = stride_u, first.bank_stride_h = stride_h;
  first.k = rows.k, first.dim = rows.hidden, first.units = units, first.users = users, first.user = rows.user;
  rows.hidden = units;
  std::vector<uint32_t> workspace(pyargs::cuda::user_mlp_select_workspace_bytes(first, batch) / 4, 0xdeadbeefu);
  return pyargs::cuda::user_mlp_select(rows, first, batch, workspace.data(), 0, nullptr);
}

extern "C" {

// 0: threads and blocks in order; else shuffled by this seed.
void pyargs_emulate_order(uint64_t seed) {
  pyargs::emulate::shuffled = seed != 0;
  pyargs::emulate::order.seed(seed);
}

// The stream that calls use from now on.
void pyargs_emulate_stream(uint64_t number, uint64_t recording, int device, bool memory) {
  pyargs::emulate::stream = {number, recording, device, memory};
}

const uint32_t* pyargs_emulate_tickets(int64_t rows) {
  const auto handle = reinterpret_cast<cudaStream_t>(pyargs::emulate::stream.number);
  return pyargs::cuda::standing_tickets(pyargs::emulate::stream.device, handle, rows);
}

// The graphs of a recording are gone.
void pyargs_emulate_destroy(uint64_t recording) {
  const auto [first, last] = user_objects.equal_range(reinterpret_cast<cudaGraph_t>(recording));
  for (auto one = first; one != last; ++one) one->second.destroy(one->second.given);
  user_objects.erase(first, last);
}

// The functions of launch.h, with a workspace of garbage as a device would give one.
const char* pyargs_emulate_topk_logprobs(const void* logits, int64_t dtype, int64_t batch, int64_t vocab,
                                         int64_t row_stride, int64_t k, float* logprobs, int64_t* ids,
                                         float* logsumexp) {
  const size_t bytes = pyargs::cuda::topk_workspace_bytes(batch, vocab);
  std::vector<uint64_t> workspace(bytes / 8 + 1, 0xdeadbeefdeadbeefull);
  return pyargs::cuda::topk_logprobs(logits, static_cast<pyargs::Dtype>(dtype), batch, vocab, row_stride,
                                     static_cast<int>(k), logprobs, ids, logsumexp, workspace.data(),
                                     pyargs::emulate::stream.device, nullptr);
}

const char* pyargs_emulate_score_select(
    const void* features, const void* weight, const void* bias, int64_t features_dtype, int64_t weight_dtype,
    int64_t bias_dtype, int64_t features_stride_b, int64_t features_stride_k, int64_t weight_stride,
    int64_t bias_stride, int64_t batch, int64_t k, int64_t hidden, int64_t weight_rows, int64_t bias_rows,
    const int64_t* user, const int64_t* ids, const int64_t* stop, int64_t stops, int64_t stop_stride,
    const float* reward_weight, const float* logprobs, const float* stop_reward, const float* uniform,
    const int64_t* count, const float* row_temperature, double temperature, const bool* finished, int64_t pad_id,
    int64_t activation, double scale, int64_t* token, int64_t* slot, float* reward, bool* finished_out,
    const void* bank, int64_t bank_dtype, int64_t bank_stride_u, int64_t bank_stride_h, int64_t units, int64_t users) {
  pyargs::ScoreRows rows{};
  rows.features = features, rows.weight = weight, rows.bias = bias;
  rows.features_dtype = static_cast<pyargs::Dtype>(features_dtype);
  rows.weight_dtype = static_cast<pyargs::Dtype>(weight_dtype);
  rows.bias_dtype = static_cast<pyargs::Dtype>(bias_dtype);
  rows.features_stride_b = features_stride_b, rows.features_stride_k = features_stride_k;
  rows.weight_stride = weight_stride, rows.bias_stride = bias_stride;
  rows.k = k, rows.hidden = hidden, rows.weight_rows = weight_rows, rows.bias_rows = bias_rows;
  rows.user = user, rows.ids = ids, rows.stop = stop, rows.stops = stops;
  rows.ids_stride = rows.logprobs_stride = k;
  rows.reward_weight = reward_weight, rows.logprobs = logprobs, rows.stop_reward = stop_reward, rows.uniform = uniform;
  rows.stop_stride = stop_stride, rows.count = count, rows.row_temperature = row_temperature;
  rows.finished = finished, rows.pad_id = pad_id;
  rows.activation = static_cast<pyargs::Activation>(activation);
  rows.scale = static_cast<float>(scale), rows.temperature = temperature;
  rows.token = token, rows.slot = slot, rows.reward = reward, rows.finished_out = finished_out;
  return run(rows, batch, bank, bank_dtype, bank_stride_u, bank_stride_h, units, users);
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
  return run(rows, batch);
}

const char* pyargs_emulate_score_step(
    const void* features, const void* weight, const void* bias, int64_t features_dtype, int64_t weight_dtype,
    int64_t bias_dtype, int64_t features_stride_b, int64_t features_stride_k, int64_t weight_stride,
    int64_t bias_stride, int64_t batch, int64_t k, int64_t hidden, int64_t weight_rows, int64_t bias_rows,
    const int64_t* user, const int64_t* ids, const float* logprobs, int64_t ids_stride, int64_t logprobs_stride,
    int64_t activation, double scale, const float* reward_weight, bool* finished, int64_t* step, const int64_t* limit,
    int64_t* token, int64_t* slot, double* chosen, const int64_t* stop, float* so_far, float* total,
    const float* temperature, const float* noise, const int64_t* own_k, const double* top_p, const double* min_p,
    const int64_t* count, int64_t stops, int64_t stop_stride, int64_t noises, int64_t pad_id, const void* bank,
    int64_t bank_dtype, int64_t bank_stride_u, int64_t bank_stride_h, int64_t units, int64_t users) {
  pyargs::ScoreRows rows{};
  rows.features = features, rows.weight = weight, rows.bias = bias;
  rows.features_dtype = static_cast<pyargs::Dtype>(features_dtype);
  rows.weight_dtype = static_cast<pyargs::Dtype>(weight_dtype);
  rows.bias_dtype = static_cast<pyargs::Dtype>(bias_dtype);
  rows.features_stride_b = features_stride_b, rows.features_stride_k = features_stride_k;
  rows.weight_stride = weight_stride, rows.bias_stride = bias_stride;
  rows.k = k, rows.hidden = hidden, rows.weight_rows = weight_rows, rows.bias_rows = bias_rows;
  rows.user = user, rows.ids = ids, rows.logprobs = logprobs, rows.stop_reward = so_far;
  rows.ids_stride = ids_stride, rows.logprobs_stride = logprobs_stride;
  rows.activation = static_cast<pyargs::Activation>(activation), rows.scale = static_cast<float>(scale);
  set_state(rows, reward_weight, finished, step, limit, token, slot, chosen, stop, so_far, total, temperature, noise,
            own_k, top_p, min_p, count, stops, stop_stride, noises, pad_id);
  return run(rows, batch, bank, bank_dtype, bank_stride_u, bank_stride_h, units, users);
}

const char* pyargs_emulate_tokenwise_step(const void* policy, const void* rewards, int64_t policy_dtype,
                                          int64_t rewards_dtype, int64_t policy_stride, int64_t rewards_stride,
                                          int64_t batch, int64_t vocab, int64_t k, const float* reward_weight,
                                          bool* finished, int64_t* step, const int64_t* limit, int64_t* token,
                                          int64_t* slot, double* chosen, const int64_t* stop, float* so_far,
                                          float* total, const float* temperature, const float* noise,
                                          const int64_t* own_k, const double* top_p, const double* min_p,
                                          const int64_t* count, int64_t stops, int64_t stop_stride, int64_t noises,
                                          int64_t pad_id) {
  pyargs::TokenwiseRows rows{};
  rows.policy = {policy, static_cast<pyargs::Dtype>(policy_dtype), vocab, policy_stride};
  rows.rewards = {rewards, static_cast<pyargs::Dtype>(rewards_dtype), vocab, rewards_stride};
  rows.k = k;
  set_state(rows, reward_weight, finished, step, limit, token, slot, chosen, stop, so_far, total, temperature, noise,
            own_k, top_p, min_p, count, stops, stop_stride, noises, pad_id);
  return run(rows, batch);
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

// strides: of the query, the keys and the values, three each.
const char* pyargs_emulate_branch_attention(const void* query, const void* key, const void* value, int64_t dtype,
                                            const int64_t* strides, int64_t batch, int64_t heads, int64_t groups,
                                            int64_t k, int64_t places, int64_t dim, const int64_t* length, double scale,
                                            void* out) {
  pyargs::BranchRows rows{};
  rows.query = query, rows.key = key, rows.value = value, rows.dtype = static_cast<pyargs::Dtype>(dtype);
  rows.query_stride_b = strides[0], rows.query_stride_h = strides[1], rows.query_stride_k = strides[2];
  rows.key_stride_b = strides[3], rows.key_stride_h = strides[4], rows.key_stride_t = strides[5];
  rows.value_stride_b = strides[6], rows.value_stride_h = strides[7], rows.value_stride_t = strides[8];
  rows.batch = batch, rows.heads = static_cast<int>(heads), rows.groups = static_cast<int>(groups);
  rows.k = static_cast<int>(k), rows.places = static_cast<int>(places), rows.dim = static_cast<int>(dim);
  rows.length = length, rows.scale = static_cast<float>(scale), rows.out = out;
  std::vector<std::array<uint64_t, 2>> workspace(pyargs::cuda::branch_workspace_bytes(rows) / 16 + 1,
                                                 {0xdeadbeefdeadbeefull, 0xdeadbeefdeadbeefull});
  return pyargs::cuda::branch_attention(rows, workspace.data(), pyargs::emulate::stream.device, nullptr);
}

}  // extern "C"
