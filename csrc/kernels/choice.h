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

// How many of the row's candidates may be chosen: the first ones. 0 where its count is none of 1 .. k. Filters of its
// own come later, see filtered().
PYARGS_HD int candidates_of(const ChoiceRows& rows, int64_t row) {
  const int64_t count = rows.count ? rows.count[row] : rows.k;
  return count >= 1 && count <= rows.k ? static_cast<int>(count) : 0;
}

// How likely candidate j is beside the first one. Log-probs are sorted.
PYARGS_HD double chance_of(const float* logprobs, int j) { return exp(static_cast<double>(logprobs[j] - logprobs[0])); }

// How many candidates pass the row's own k, then top-p, then min-p; at least 1. chance: of all k.
PYARGS_HD int filtered(const ChoiceRows& rows, int64_t row, const double* chance) {
  const RowState& state = rows.state;
  const int own = static_cast<int>(state.own_k[row] < rows.k ? state.own_k[row] : rows.k);
  const double top_p = state.top_p[row], min_p = state.min_p[row];
  double all = 0.0, total = 0.0;
  for (int j = 0; j < own; ++j) all += chance[j];
  for (int j = 0; j < own; ++j) {
    total += chance[j];
    const bool likely = (total - chance[j] < top_p * all || top_p >= 1.0) && chance[j] >= min_p * chance[0];
    if (j > 0 && !likely) return j;
  }
  return own > 1 ? own : 1;
}

// How many of the row's candidates may be chosen, filters of its own included; 0: none. chance: room for k numbers.
PYARGS_HD int count_of(const ChoiceRows& rows, int64_t row, const float* logprobs, double* chance) {
  if (!rows.state.own_k) return candidates_of(rows, row);
  for (int j = 0; j < rows.k; ++j) chance[j] = chance_of(logprobs, j);
  return filtered(rows, row, chance);
}

// The weight of the rewards: a mean over the answer differs between candidates only in their own share of it.
PYARGS_HD float weight_of(const ChoiceRows& rows, int64_t row) {
  const float weight = rows.reward_weight[row];
  return rows.state.total ? weight / static_cast<float>(rows.state.step[row] + 1) : weight;
}

PYARGS_HD bool samples(const ChoiceRows& rows) { return rows.uniform || rows.state.noise; }

PYARGS_HD float uniform_of(const ChoiceRows& rows, int64_t row) {
  if (rows.uniform) return rows.uniform[row];
  const int64_t step = rows.state.step[row], last = rows.state.noises - 1;
  return rows.state.noise[row * rows.state.noises + (step < last ? step : last)];
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
// row's, of which the first `count` count.
PYARGS_HD Leader leader_of(const ChoiceRows& rows, int64_t row, int count, const float* logprobs, const float* reward,
                           int first = 0, int step = 1) {
  const float weight = weight_of(rows, row);
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

// How likely a candidate with this score is beside one with the best score.
PYARGS_HD double odds_of(float score, float best, double temperature) {
  return exp((static_cast<double>(score) - best) / temperature);
}

// The first candidate whose cumulated share exceeds `uniform`, where share_at(j) is that of candidate j; it is asked in
// order. Where rounding leaves none, the last one with a share.
template <class ShareAt>
PYARGS_HD int sample(int count, float uniform, int best, ShareAt share_at) {
  double cumulated = 0.0;
  int last = best;
  for (int j = 0; j < count; ++j) {
    const double share = share_at(j);
    if (share > 0.0) last = j;
    cumulated += share;
    if (cumulated > uniform) return j;
  }
  return last;
}

// The slot chosen where `best` leads all candidates: that one, or sampled(temperature); -1 if a score or the
// temperature is broken.
template <class Sampled>
PYARGS_HD int choose(const ChoiceRows& rows, int64_t row, const Leader& best, Sampled sampled) {
  if (best.broken) return -1;
  if (!samples(rows)) return best.slot;
  const double temperature = rows.row_temperature ? rows.row_temperature[row] : rows.temperature;
  if (!(temperature >= 0.0 && temperature < INFINITY)) return -1;
  return temperature == 0.0 || best.score == -INFINITY ? best.slot : sampled(temperature);
}

// One thread's choice. Sums go one after the other, as in choose_by_warp.
PYARGS_HD int choose(const ChoiceRows& rows, int64_t row, int count, const float* logprobs, const float* reward,
                     const Leader& best) {
  return choose(rows, row, best, [&](double temperature) {
    const float weight = weight_of(rows, row);
    const auto odds_at = [&](int j) { return odds_of(score(logprobs[j], weight, reward[j]), best.score, temperature); };
    double total = 0.0;
    for (int j = 0; j < count; ++j) total += odds_at(j);
    return sample(count, uniform_of(rows, row), best.slot, [&](int j) { return odds_at(j) / total; });
  });
}

// Notes a choice in the row's state, but for `finished`, which other threads of the row may be reading. A row that ends
// has no slot that follows.
PYARGS_HD void note_choice(const RowState& state, int64_t row, int64_t token, int slot, float reward, float spread,
                           bool finished) {
  state.token[row] = token;
  state.slot[row] = finished ? -1 : slot;
  double* chosen = state.chosen + row * kChosen;
  chosen[0] = static_cast<double>(token);
  chosen[1] = slot;
  chosen[2] = reward;
  chosen[3] = spread;
  chosen[4] = finished;
}

// The step of a row that chose this slot among its first `count` candidates with these rewards; the end of its answer.
PYARGS_HD void note_step(const ChoiceRows& rows, int64_t row, int slot, int64_t token, bool finished, int count,
                         const float* rewards) {
  const RowState& state = rows.state;
  // Sums one after the other, rounded once: torch's own sums depend on how wide the row is.
  const float several = static_cast<float>(count > 1 ? count : 1);
  double sum = 0.0, squares = 0.0;
  for (int j = 0; j < count; ++j) sum += rewards[j];
  const float mean = static_cast<float>(sum) / several;
  for (int j = 0; j < count; ++j) {
    const float off = rewards[j] - mean, square = off * off;
    squares += square;
  }
  const float spread = sqrtf(static_cast<float>(squares) / several);
  const float reward = count == 0 ? 0.0f : rewards[slot < 0 ? 0 : slot];
  const int64_t step = ++state.step[row];
  float so_far = reward;
  if (state.total) {
    const float total = state.total[row] + reward;
    state.total[row] = total;
    so_far = total / static_cast<float>(step);
  }
  if (state.so_far) state.so_far[row] = so_far;
  finished = finished || step >= state.limit[row];
  state.finished[row] = finished;
  note_choice(state, row, token, slot, reward, spread, finished);
}

// What becomes of a choice; by one thread of the row, behind everything that reads the row's state. rewards: of its
// first `count` candidates.
PYARGS_HD void write_choice(const ChoiceRows& rows, int64_t row, int slot, const int64_t* ids, int count,
                            const float* rewards) {
  const int64_t token = slot < 0 ? rows.pad_id : ids[slot];
  const bool finished = slot < 0 || is_stop(rows, row, token);
  if (rows.state.step) return note_step(rows, row, slot, token, finished, count, rewards);
  rows.slot[row] = slot;
  rows.token[row] = token;
  rows.finished_out[row] = finished;
}

// What a row gets that had finished before: candidates first, first + step ... of it, as above.
PYARGS_HD void pad_row(const ChoiceRows& rows, int64_t row, int first = 0, int step = 1) {
  if (rows.state.step) {
    if (first == 0) note_choice(rows.state, row, rows.pad_id, 0, 0.0f, 0.0f, true);
    return;
  }
  for (int j = first; j < rows.k; j += step) rows.reward[row * rows.k + j] = 0.0f;
  if (first > 0) return;
  rows.token[row] = rows.pad_id;
  rows.slot[row] = 0;
  rows.finished_out[row] = true;
}

}  // namespace
}  // namespace pyargs
