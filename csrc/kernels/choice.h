// The choice of the next token among k scored candidates, on the CPU and on CUDA. Everything is static: each capability
// keeps its own copy.
#pragma once

#include <cmath>

#include "rows.h"

namespace pyargs {
namespace {

PYARGS_HD bool is_stop(const ChoiceRows& rows, int64_t row, int64_t id) {
  const int64_t* stop = rows.stop + row * rows.stop_stride;
  for (int64_t e = 0; e < rows.stops; ++e) {
    if (stop[e] == id) return true;
  }
  return false;
}

// How many of the row's candidates may be chosen: the first ones. 0 where its count is none of 1 .. k.
PYARGS_HD int candidates_of(const ChoiceRows& rows, int64_t row) {
  const int64_t count = rows.count ? rows.count[row] : rows.k;
  return count >= 1 && count <= rows.k ? static_cast<int>(count) : 0;
}

// logprob + w * reward; w == 0 leaves the log-prob alone, whatever the reward.
PYARGS_HD float score(float logprob, float weight, float reward) {
  return weight == 0.0f ? logprob : logprob + weight * reward;
}

// No score to choose by: NaN, +inf, or a finite log-prob and reward whose sum is beyond float32. -inf forbids a token.
PYARGS_HD bool broken(float score, float logprob, float reward) {
  return !(score < INFINITY) || (score == -INFINITY && logprob != -INFINITY && reward != -INFINITY);
}

// The leader of some candidates, and whether there is no choice: one of them has a broken score, or the row has no
// candidates. Equal scores go to the lower slot.
struct Leader {
  int slot;
  float score;
  bool broken;
};

// Of candidates first, first + step ...: on the CPU all of them, on CUDA those of a lane. Log-probs and rewards are the
// row's.
PYARGS_HD Leader leader_of(const ChoiceRows& rows, int64_t row, const float* logprobs, const float* reward,
                           int first = 0, int step = 1) {
  const float weight = rows.reward_weight[row];
  const int count = candidates_of(rows, row);
  Leader best{first, -INFINITY, count == 0};
  for (int j = first; j < count; j += step) {
    const float s = score(logprobs[j], weight, reward[j]);
    best.broken |= broken(s, logprobs[j], reward[j]);
    if (s > best.score) {
      best.score = s;
      best.slot = j;
    }
  }
  return best;
}

// The slot chosen where `best` leads all candidates: that one, or a sample; -1 if a score or the temperature is broken.
PYARGS_HD int choose(const ChoiceRows& rows, int64_t row, const float* logprobs, const float* reward,
                     const Leader& best) {
  if (best.broken) return -1;
  if (!rows.uniform) return best.slot;
  const double temperature = rows.row_temperature ? rows.row_temperature[row] : rows.temperature;
  if (!(temperature >= 0.0 && temperature < INFINITY)) return -1;
  if (temperature == 0.0 || best.score == -INFINITY) return best.slot;
  const float weight = rows.reward_weight[row];
  const int count = candidates_of(rows, row);
  double total = 0.0;
  for (int j = 0; j < count; ++j) {
    total += exp((static_cast<double>(score(logprobs[j], weight, reward[j])) - best.score) / temperature);
  }
  double cumulated = 0.0;
  int last = best.slot;  // where rounding leaves none
  for (int j = 0; j < count; ++j) {
    const double p = exp((static_cast<double>(score(logprobs[j], weight, reward[j])) - best.score) / temperature);
    if (p > 0.0) last = j;
    cumulated += p / total;
    if (cumulated > rows.uniform[row]) return j;
  }
  return last;
}

PYARGS_HD void write_choice(const ChoiceRows& rows, int64_t row, int slot, const int64_t* ids) {
  rows.slot[row] = slot;
  rows.token[row] = slot < 0 ? rows.pad_id : ids[slot];
  rows.finished_out[row] = slot < 0 || is_stop(rows, row, ids[slot]);
}

// What a row gets that had finished before: candidates first, first + step ... of it, as above.
PYARGS_HD void pad_row(const ChoiceRows& rows, int64_t row, int first = 0, int step = 1) {
  for (int j = first; j < rows.k; j += step) rows.reward[row * rows.k + j] = 0.0f;
  if (first > 0) return;
  rows.token[row] = rows.pad_id;
  rows.slot[row] = 0;
  rows.finished_out[row] = true;
}

}  // namespace
}  // namespace pyargs
