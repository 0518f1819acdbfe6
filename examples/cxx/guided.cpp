// A guided answer without Python: the tokens that pyargs.Engine chooses for one user.
//
//   guided LM.safetensors USERS.safetensors USER WEIGHT K STEPS TOKEN...
//
// LM and USERS are what `python examples/cxx/export.py` writes; USER is a row of its table, WEIGHT the raw w, K the
// number of candidates, TOKEN... the ids of the prompt. It prints the ids of the answer; a stop token ends it and is
// not printed. PYARGS_CPU_CAPABILITY says which code is used.
#include <pyargs/kernels.h>
#include <pyargs/stack.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "safetensors.h"

using pyargs::View;

namespace {

struct Sizes {  // as export.py orders them
  int64_t dim, heads, kv_heads, head_dim, inner, layers, vocabulary;
};

// A Llama as transformers names its weights.
void pack(pyargs::Stack& stack, const Sizes& sizes, const Safetensors& lm) {
  const int64_t keys = sizes.heads * sizes.head_dim, values = keys + sizes.kv_heads * sizes.head_dim;
  for (int64_t layer = 0; layer < sizes.layers; ++layer) {
    const std::string name = "model.layers." + std::to_string(layer) + ".";
    stack.pack(layer, {{"qkv", 0, false, lm[name + "self_attn.q_proj.weight"]},
                       {"qkv", keys, false, lm[name + "self_attn.k_proj.weight"]},
                       {"qkv", values, false, lm[name + "self_attn.v_proj.weight"]},
                       {"o", 0, false, lm[name + "self_attn.o_proj.weight"]},
                       {"gate_up", 0, true, lm[name + "mlp.gate_proj.weight"]},
                       {"gate_up", 32, true, lm[name + "mlp.up_proj.weight"]},
                       {"down", 0, false, lm[name + "mlp.down_proj.weight"]}});
    stack.norms(layer, lm[name + "input_layernorm.weight"], lm[name + "post_attention_layernorm.weight"]);
  }
  stack.pack(0, {{"head", 0, false, lm["lm_head.weight"]}});
  stack.embedding(lm["model.embed_tokens.weight"], lm["model.norm.weight"]);
}

std::vector<int64_t> answer(const Safetensors& lm, const Safetensors& users, int64_t user, float weight, int64_t k,
                            int64_t steps, const std::vector<int64_t>& prompt) {
  const Sizes& sizes = *lm["sizes"].as<const Sizes>();
  const int64_t dim = sizes.dim, tokens = lm["tokens"].as<const int64_t>()[0];  // those that have a text
  pyargs::Stack stack("float32", dim, sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.inner, sizes.layers,
                      sizes.vocabulary, true, lm["epsilon"].as<const float>()[0]);
  pack(stack, sizes, lm);
  pyargs::Cache cache(sizes.layers, sizes.kv_heads, sizes.head_dim, 1, lm["cosine"], lm["sine"]);

  // The head: reward = <direction of the user, state>.
  const View &directions = users["directions"], &stop = lm["stop"];
  if (user < 0 || user >= directions.size(0)) throw std::runtime_error("no such user");
  const auto length = static_cast<int64_t>(prompt.size());
  std::vector<float> states(std::max(length, k) * dim), logits(tokens), logprobs(k);
  std::vector<int64_t> candidates(k);

  // What the row keeps from step to step.
  int64_t step = 0, token = 0, slot = 0;
  double chosen[pyargs::kChosen];
  bool finished = false;
  float so_far = 0.0f, logsumexp;
  pyargs::ScoreRows rows{};
  rows.k = k;
  rows.reward_weight = &weight;
  rows.finished = &finished;
  rows.stop = stop.as<const int64_t>();
  rows.stops = stop.size();
  rows.features = states.data();
  rows.hidden = rows.features_stride_k = rows.weight_stride = dim;
  rows.features_stride_b = k * dim;
  rows.weight = directions.data;
  rows.weight_rows = directions.size(0);
  rows.user = &user;
  rows.logprobs = logprobs.data();
  rows.ids = candidates.data();
  rows.logprobs_stride = rows.ids_stride = k;
  rows.stop_reward = &so_far;  // a head never saw the state behind a stop token: it earns what the text has so far
  rows.scale = 1.0f;
  rows.state.step = &step;
  rows.state.limit = &steps;
  rows.state.token = &token;
  rows.state.slot = &slot;
  rows.state.chosen = chosen;
  rows.state.finished = &finished;
  rows.state.so_far = &so_far;

  stack.forward(cache, View(prompt.data(), {1, length}), {}, {}, {}, false, View(states.data(), {1, length, dim}));
  std::vector<float> last(states.begin() + (length - 1) * dim, states.begin() + length * dim);
  for (int64_t i = 0; i < dim; ++i) so_far += directions.as<const float>()[user * dim + i] * last[i];
  std::vector<int64_t> found;
  while (!finished) {
    stack.logits(View(last.data(), {1, dim}), k, View(logits.data(), {1, tokens}));
    pyargs::cpu::topk_logprobs({logits.data(), pyargs::Dtype::kFloat32, tokens, tokens}, 1, k, logprobs.data(),
                               candidates.data(), &logsumexp);
    // The candidates, side by side behind the one prefix: their states are what the head reads, and the winner's is
    // what the policy goes on from.
    stack.forward(cache, View(candidates.data(), {1, k}), {}, {}, {}, true, View(states.data(), {1, k, dim}));
    pyargs::cpu::score_select(rows, 1);
    const auto at = static_cast<int64_t>(chosen[1]);
    if (at < 0) throw std::runtime_error("the rewards are not finite");
    for (int64_t i = 0; i < stop.size(); ++i) {
      if (token == rows.stop[i]) return found;
    }
    found.push_back(token);
    if (finished) break;  // the last of the steps: slot is -1
    cache.commit(View(&slot, {1}));
    last.assign(states.begin() + at * dim, states.begin() + (at + 1) * dim);
  }
  return found;
}

}  // namespace

int main(int count, char** words) try {
  if (count < 8) throw std::runtime_error("guided LM USERS USER WEIGHT K STEPS TOKEN...");
  if (const char* wanted = std::getenv("PYARGS_CPU_CAPABILITY")) pyargs::set_cpu_capability(wanted);
  std::vector<int64_t> prompt;
  for (int i = 7; i < count; ++i) prompt.push_back(std::stoll(words[i]));
  const Safetensors lm(words[1]), users(words[2]);
  for (int64_t token : answer(lm, users, std::stoll(words[3]), std::stof(words[4]), std::stoll(words[5]),
                              std::stoll(words[6]), prompt)) {
    std::printf("%lld\n", static_cast<long long>(token));
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "guided: %s\n", error.what());
  return 1;
}
