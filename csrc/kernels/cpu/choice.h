// The choice of the next token among k scored candidates on the CPU, and the arguments that ops with such a choice
// share. Everything is static: each capability keeps its own copy.
#pragma once

#include <cmath>

#include "../rows.h"

namespace pyargs {
namespace {

bool is_stop(const ChoiceRows& rows, int64_t id) {
  for (int64_t e = 0; e < rows.stops; ++e) {
    if (rows.stop[e] == id) return true;
  }
  return false;
}

// logprob + w * reward; w == 0 leaves the log-prob alone, whatever the reward.
inline float score(float logprob, float weight, float reward) {
  return weight == 0.0f ? logprob : logprob + weight * reward;
}

// No score to choose by: NaN, +inf, or a finite log-prob and reward whose sum is beyond float32. -inf forbids a token.
inline bool broken(float score, float logprob, float reward) {
  return !(score < INFINITY) || (score == -INFINITY && logprob != -INFINITY && reward != -INFINITY);
}

// The slot chosen among candidates with these log-probs and the rewards of the row, or -1 if a score is broken.
int64_t choose(const ChoiceRows& rows, int64_t row, const float* logprobs) {
  const float* reward = rows.reward + row * rows.k;
  const float weight = rows.reward_weight[row];
  int64_t best = 0;
  float top = -INFINITY;
  for (int64_t j = 0; j < rows.k; ++j) {
    const float s = score(logprobs[j], weight, reward[j]);
    if (broken(s, logprobs[j], reward[j])) return -1;
    if (s > top) {
      top = s;
      best = j;
    }
  }
  if (!rows.uniform || top == -INFINITY) return best;
  double total = 0.0;
  for (int64_t j = 0; j < rows.k; ++j) {
    total += std::exp((static_cast<double>(score(logprobs[j], weight, reward[j])) - top) / rows.temperature);
  }
  double cumulated = 0.0;
  int64_t last = best;
  for (int64_t j = 0; j < rows.k; ++j) {
    const double p = std::exp((static_cast<double>(score(logprobs[j], weight, reward[j])) - top) / rows.temperature);
    if (p > 0.0) last = j;
    cumulated += p / total;
    if (cumulated > rows.uniform[row]) return j;
  }
  return last;
}

void write_choice(const ChoiceRows& rows, int64_t row, int64_t slot, const int64_t* ids) {
  rows.slot[row] = slot;
  rows.token[row] = slot < 0 ? rows.pad_id : ids[slot];
  rows.finished_out[row] = slot < 0 || is_stop(rows, ids[slot]);
}

// What a row gets that had finished before.
void pad_row(const ChoiceRows& rows, int64_t row) {
  for (int64_t j = 0; j < rows.k; ++j) rows.reward[row * rows.k + j] = 0.0f;
  rows.token[row] = rows.pad_id;
  rows.slot[row] = 0;
  rows.finished_out[row] = true;
}

}  // namespace
}  // namespace pyargs

#ifdef PYARGS_HOST

#include "../../ops/tensor.h"

namespace pyargs {
namespace {

// Checks the arguments of the choice and puts them into `rows`, which they must outlive.
void set_choice(ChoiceRows& rows, int64_t batch, Array& reward_weight, Array& finished, std::optional<Array>& stop,
                int64_t pad_id, std::optional<double> temperature, std::optional<Array>& uniform) {
  reward_weight.require({batch}, aoti_torch_dtype_float32(), "reward_weight must be [B] float32");
  finished.require({batch}, aoti_torch_dtype_bool(), "finished must be [B] bool");
  if (stop) {
    check(stop->dim() == 1, "stop must be [E] int64");
    stop->require({stop->size(0)}, aoti_torch_dtype_int64(), "stop must be [E] int64");
    rows.stop = stop->data<int64_t>();
    rows.stops = stop->size(0);
  }
  check(temperature.has_value() == uniform.has_value(), "temperature and uniform belong together");
  if (uniform) {
    check(*temperature > 0.0 && *temperature < INFINITY, "temperature must be > 0 and finite");
    uniform->require({batch}, aoti_torch_dtype_float32(), "uniform must be [B] float32");
    rows.uniform = uniform->data<float>();
    rows.temperature = *temperature;
  }
  rows.reward_weight = reward_weight.data<float>();
  rows.finished = finished.data<bool>();
  rows.pad_id = pad_id;
}

// New tensors for the choice of each row.
class ChoiceResults {
 public:
  ChoiceResults(ChoiceRows& rows, int64_t batch, const Array& like)
      : token_({batch}, aoti_torch_dtype_int64(), like),
        slot_({batch}, aoti_torch_dtype_int64(), like),
        reward_({batch, rows.k}, aoti_torch_dtype_float32(), like),
        finished_({batch}, aoti_torch_dtype_bool(), like) {
    rows.token = token_.data<int64_t>();
    rows.slot = slot_.data<int64_t>();
    rows.reward = reward_.data<float>();
    rows.finished_out = finished_.data<bool>();
  }

  std::tuple<StableIValue, StableIValue, StableIValue, StableIValue> release() {
    return {token_.release(), slot_.release(), reward_.release(), finished_.release()};
  }

 private:
  Result token_, slot_, reward_, finished_;
};

}  // namespace
}  // namespace pyargs

#endif  // PYARGS_HOST
