// The choice of the next token among k scored candidates on the CPU. Everything is static: each capability keeps its
// own copy.
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
