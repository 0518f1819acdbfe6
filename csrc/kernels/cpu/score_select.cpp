// score_select: the reward of every candidate for its row's user, combined with the log-probability; the choice
// (greedy or sampled), and the row's finished flag. See pyargs/ops/score_select.py for the contract.
//
// One thread does a whole row, so a row's result depends neither on the batch nor on the number of threads.

#include "../choice.h"
#include "floats.h"
#include "launch.h"

namespace pyargs {
namespace PYARGS_CPU {
namespace {

constexpr int kTile = 1024;  // of hidden: weight, bias and one candidate as floats stay in the first-level cache

// erf form, by Abramowitz and Stegun 7.1.26: erf is off by at most 1.5e-7. NaN passes through t.
inline float gelu(float x) {
  x = x < -100.0f ? -100.0f : x;  // 0 from there on, and -inf * 0 is NaN
  const float z = (x < 0.0f ? -x : x) * 0.70710678f;
  const float t = 1.0f / (1.0f + 0.3275911f * z);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float tail = p * t * exp2_negative(-z * z * kLog2E);  // 1 - erf(z)
  return 0.5f * x * (x < 0.0f ? tail : 2.0f - tail);
}

template <Activation activation>
inline float apply(float x) {
  if (activation == Activation::kRelu) return x < 0.0f ? 0.0f : x;  // NaN stays
  if (activation == Activation::kLeakyRelu) return x < 0.0f ? 0.2f * x : x;
  if (activation == Activation::kGelu) return gelu(x);
  return x;
}

// Sum of w * activation(x + b), in 16 lanes that are added pairwise at the end: a reduction clause would add them up
// one after the other, which for a short row costs more than the row.
constexpr int kLanes = 16;

template <Activation activation, bool has_bias>
inline float dot(const float* __restrict x, const float* __restrict w, const float* __restrict b, int n) {
  alignas(64) float lanes[kLanes];
  const int whole = n - n % kLanes;
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) lanes[l] = 0.0f;
  if (whole > 0) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      float sum = 0.0f;
      int i = 0;
      do {
        sum += w[i + l] * apply<activation>(has_bias ? x[i + l] + b[i + l] : x[i + l]);
        i += kLanes;
      } while (i < whole);
      lanes[l] = sum;
    }
  }
  for (int i = whole; i < n; ++i) lanes[i - whole] += w[i] * apply<activation>(has_bias ? x[i] + b[i] : x[i]);
  float eight[8], four[4];
#pragma omp simd
  for (int l = 0; l < 8; ++l) eight[l] = lanes[l] + lanes[l + 8];
#pragma omp simd
  for (int l = 0; l < 4; ++l) four[l] = eight[l] + eight[l + 4];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

template <Activation activation, bool has_bias>
void rewards(const ScoreRows& rows, int64_t row, int count, float* out) {
  alignas(64) float x_buffer[kTile], w_buffer[kTile], b_buffer[kTile];
  const int64_t weight_row = rows.weight_rows > 1 ? rows.user[row] : 0;
  const int64_t bias_row = rows.bias_rows > 1 ? rows.user[row] : 0;
  for (int j = 0; j < count; ++j) out[j] = 0.0f;
  for (int64_t start = 0; start < rows.hidden; start += kTile) {
    const int n = static_cast<int>(rows.hidden - start < kTile ? rows.hidden - start : kTile);
    const float* w = as_floats(rows.weight_dtype, rows.weight, weight_row * rows.weight_stride + start, n, w_buffer);
    const float* b = nullptr;
    if (has_bias) b = as_floats(rows.bias_dtype, rows.bias, bias_row * rows.bias_stride + start, n, b_buffer);
    for (int j = 0; j < count; ++j) {
      const int64_t at = row * rows.features_stride_b + j * rows.features_stride_k + start;
      out[j] += dot<activation, has_bias>(as_floats(rows.features_dtype, rows.features, at, n, x_buffer), w, b, n);
    }
  }
  for (int j = 0; j < count; ++j) out[j] *= rows.scale;
}

template <Activation activation>
void rewards(const ScoreRows& rows, int64_t row, int count, float* out) {
  if (rows.bias) {
    rewards<activation, true>(rows, row, count, out);
  } else {
    rewards<activation, false>(rows, row, count, out);
  }
}

void select_row(const ScoreRows& rows, int64_t row) {
  const int64_t* ids = rows.ids + row * rows.ids_stride;
  const float* logprobs = rows.logprobs + row * rows.logprobs_stride;
  if (rows.finished[row]) return pad_row(rows, row);
  float own[kMaxTopK];  // where rows have a state, k is at most so large
  double chance[kMaxTopK];
  float* reward = rows.reward ? rows.reward + row * rows.k : own;
  int64_t users = rows.weight_rows > rows.bias_rows ? rows.weight_rows : rows.bias_rows;
  users = rows.bank_rows > users ? rows.bank_rows : users;
  const int count = count_of(rows, row, logprobs, chance);
  for (int64_t j = count; j < rows.k; ++j) reward[j] = 0.0f;
  int slot = -1;
  if (users > 1 && (rows.user[row] < 0 || rows.user[row] >= users)) {
    for (int j = 0; j < count; ++j) reward[j] = NAN;
  } else {
    switch (rows.activation) {
      case Activation::kIdentity:
        rewards<Activation::kIdentity>(rows, row, count, reward);
        break;
      case Activation::kRelu:
        rewards<Activation::kRelu>(rows, row, count, reward);
        break;
      case Activation::kGelu:
        rewards<Activation::kGelu>(rows, row, count, reward);
        break;
      case Activation::kLeakyRelu:
        rewards<Activation::kLeakyRelu>(rows, row, count, reward);
        break;
    }
    if (rows.stop_reward) {
      for (int j = 0; j < count; ++j) {
        if (is_stop(rows, row, ids[j])) reward[j] = rows.stop_reward[row];
      }
    }
    slot = choose(rows, row, count, logprobs, reward, leader_of(rows, row, count, logprobs, reward));
  }
  write_choice(rows, row, slot, ids, count, reward);
}

}  // namespace

void score_select(const ScoreRows& rows, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) select_row(rows, row);
}

}  // namespace PYARGS_CPU
}  // namespace pyargs
