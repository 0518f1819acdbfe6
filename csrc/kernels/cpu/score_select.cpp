// score_select: the reward of every candidate for its row's user, combined with the log-probability; the choice
// (greedy or sampled), and the row's finished flag. See pyargs/ops/score_select.py for the contract.
//
// One thread does a whole row, so a row's result depends neither on the batch nor on the number of threads.

#include "choice.h"
#include "floats.h"

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
void rewards(const ScoreRows& rows, int64_t row, float* out) {
  alignas(64) float x_buffer[kTile], w_buffer[kTile], b_buffer[kTile];
  const int64_t weight_row = rows.weight_rows > 1 ? rows.user[row] : 0;
  const int64_t bias_row = rows.bias_rows > 1 ? rows.user[row] : 0;
  for (int64_t j = 0; j < rows.k; ++j) out[j] = 0.0f;
  for (int64_t start = 0; start < rows.hidden; start += kTile) {
    const int n = static_cast<int>(rows.hidden - start < kTile ? rows.hidden - start : kTile);
    const float* w = as_floats(rows.weight_dtype, rows.weight, weight_row * rows.weight_stride + start, n, w_buffer);
    const float* b = nullptr;
    if (has_bias) b = as_floats(rows.bias_dtype, rows.bias, bias_row * rows.bias_stride + start, n, b_buffer);
    for (int64_t j = 0; j < rows.k; ++j) {
      const int64_t at = row * rows.features_stride_b + j * rows.features_stride_k + start;
      out[j] += dot<activation, has_bias>(as_floats(rows.features_dtype, rows.features, at, n, x_buffer), w, b, n);
    }
  }
  for (int64_t j = 0; j < rows.k; ++j) out[j] *= rows.scale;
}

template <Activation activation>
void rewards(const ScoreRows& rows, int64_t row, float* out) {
  if (rows.bias) {
    rewards<activation, true>(rows, row, out);
  } else {
    rewards<activation, false>(rows, row, out);
  }
}

void select_row(const ScoreRows& rows, int64_t row) {
  float* reward = rows.reward + row * rows.k;
  const int64_t* ids = rows.ids + row * rows.k;
  if (rows.finished[row]) return pad_row(rows, row);
  const int64_t users = rows.weight_rows > rows.bias_rows ? rows.weight_rows : rows.bias_rows;
  int64_t slot = -1;
  if (users > 1 && (rows.user[row] < 0 || rows.user[row] >= users)) {
    for (int64_t j = 0; j < rows.k; ++j) reward[j] = NAN;
  } else {
    switch (rows.activation) {
      case Activation::kIdentity:
        rewards<Activation::kIdentity>(rows, row, reward);
        break;
      case Activation::kRelu:
        rewards<Activation::kRelu>(rows, row, reward);
        break;
      case Activation::kGelu:
        rewards<Activation::kGelu>(rows, row, reward);
        break;
      case Activation::kLeakyRelu:
        rewards<Activation::kLeakyRelu>(rows, row, reward);
        break;
    }
    if (rows.stop_reward) {
      for (int64_t j = 0; j < rows.k; ++j) {
        if (is_stop(rows, ids[j])) reward[j] = rows.stop_reward[row];
      }
    }
    slot = choose(rows, row, rows.logprobs + row * rows.k);
  }
  write_choice(rows, row, slot, ids);
}

}  // namespace

void score_rows(const ScoreRows& rows, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) select_row(rows, row);
}

}  // namespace PYARGS_CPU

#ifdef PYARGS_X86
namespace avx2 {
void score_rows(const ScoreRows&, int64_t, int64_t);
}
namespace avx512 {
void score_rows(const ScoreRows&, int64_t, int64_t);
}
#endif

}  // namespace pyargs

#ifdef PYARGS_HOST  // the op: schema, checks, threads

#include "../../ops/tensor.h"
#ifdef PYARGS_CUDA_ARCHS
#include "../cuda/launch.h"
#endif

namespace pyargs {
namespace {

using Handle = AtenTensorHandle;

using Run = void (*)(const ScoreRows&, int64_t batch, const Array& like);

void run_on_cpu(const ScoreRows& rows, int64_t batch, const Array&) {
  const int64_t row_work = rows.k * rows.hidden * (rows.activation == Activation::kGelu ? 8 : 1);
  const int64_t grain = 1 + 65536 / row_work;  // about 10 us: less is not worth waiting for a thread that sleeps
  if (batch <= grain) {
    PYARGS_DISPATCH(score_rows, rows, 0, batch);
  } else {
    torch::stable::parallel_for(0, batch, grain,
                                [&rows](int64_t begin, int64_t end) { PYARGS_DISPATCH(score_rows, rows, begin, end); });
  }
}

#ifdef PYARGS_CUDA_ARCHS
void run_on_cuda(const ScoreRows& rows, int64_t batch, const Array& like) {
  check(rows.k <= kMaxTopK, "k must be at most 64 on CUDA");
  check_launch(cuda::score_select(rows, batch, like.device_index(), cuda_stream(like)));
}
#endif

// The handles are ours: boxed arguments come owned, and results are given away.
template <Run run>
std::tuple<StableIValue, StableIValue, StableIValue, StableIValue> score_select(
    Handle features_handle, Handle weight_handle, Handle user_handle, Handle reward_weight_handle,
    Handle logprobs_handle, Handle ids_handle, Handle finished_handle, std::optional<Handle> bias_handle,
    int64_t activation, double scale, std::optional<Handle> stop_handle, std::optional<Handle> stop_reward_handle,
    int64_t pad_id, std::optional<double> temperature, std::optional<Handle> uniform_handle) {
  Array features(features_handle), weight(weight_handle), user(user_handle), reward_weight(reward_weight_handle),
      logprobs(logprobs_handle), ids(ids_handle), finished(finished_handle);
  std::optional<Array> bias = array_or_none(bias_handle), stop = array_or_none(stop_handle),
                       stop_reward = array_or_none(stop_reward_handle), uniform = array_or_none(uniform_handle);
#ifdef PYARGS_CUDA_ARCHS
  if (run == run_on_cuda) {
    const auto given = [](std::optional<Array>& array) { return array ? &*array : nullptr; };
    check_one_device({&features, &weight, &user, &reward_weight, &logprobs, &ids, &finished, given(bias), given(stop),
                      given(stop_reward), given(uniform)});
  }
#endif
  const int32_t int64 = aoti_torch_dtype_int64(), float32 = aoti_torch_dtype_float32();

  ScoreRows rows{};
  check(features.dim() == 3, "features must be [B, k, H]");
  const int64_t batch = features.size(0);
  rows.k = features.size(1);
  rows.hidden = features.size(2);
  check(rows.k >= 1 && rows.hidden >= 1, "features must have k >= 1 and H >= 1");
  features.require_dense_rows();
  rows.features_dtype = features.float_dtype("features must be float32, bfloat16 or float16");
  const auto check_bank = [&](Array& bank, const char* message) {
    check(bank.dim() == 2 && bank.size(0) >= 1 && bank.size(1) == rows.hidden, message);
    bank.require_dense_rows();
    return bank.float_dtype(message);
  };
  rows.weight_dtype = check_bank(weight, "weight must be [W, H] float32, bfloat16 or float16");
  rows.weight_rows = weight.size(0);
  rows.bias_rows = 1;
  if (bias) {
    rows.bias_dtype = check_bank(*bias, "bias must be [U, H] float32, bfloat16 or float16");
    rows.bias_rows = bias->size(0);
    check(rows.weight_rows == 1 || rows.bias_rows == 1 || rows.weight_rows == rows.bias_rows,
          "weight and bias must have as many rows, or one of them a single row");
    rows.bias = bias->data();
    rows.bias_stride = bias->stride(0);
  }
  user.require({batch}, int64, "user must be [B] int64");
  logprobs.require({batch, rows.k}, float32, "logprobs must be [B, k] float32");
  ids.require({batch, rows.k}, int64, "ids must be [B, k] int64");
  check(activation >= 0 && activation <= 3, "activation must be 0 identity, 1 relu, 2 gelu or 3 leaky_relu");
  set_choice(rows, batch, reward_weight, finished, stop, pad_id, temperature, uniform);
  if (stop_reward) {
    check(stop.has_value(), "stop_reward needs stop");
    stop_reward->require({batch}, float32, "stop_reward must be [B] float32");
    rows.stop_reward = stop_reward->data<float>();
  }
  rows.features = features.data();
  rows.features_stride_b = features.stride(0);
  rows.features_stride_k = features.stride(1);
  rows.weight = weight.data();
  rows.weight_stride = weight.stride(0);
  rows.user = user.data<int64_t>();
  rows.ids = ids.data<int64_t>();
  rows.logprobs = logprobs.data<float>();
  rows.activation = static_cast<Activation>(activation);
  rows.scale = static_cast<float>(scale);

  ChoiceResults results(rows, batch, features);
  if (batch > 0) run(rows, batch, features);
  return results.release();
}

}  // namespace
}  // namespace pyargs

STABLE_TORCH_LIBRARY_FRAGMENT(pyargs, m) {
  // All arguments are positional and the activation is a number: keywords and strings cost more than a small kernel.
  m.def(
      "score_select(Tensor features, Tensor weight, Tensor user, Tensor reward_weight, Tensor logprobs, Tensor ids, "
      "Tensor finished, Tensor? bias=None, SymInt activation=0, float scale=1., Tensor? stop=None, "
      "Tensor? stop_reward=None, SymInt pad_id=0, float? temperature=None, Tensor? uniform=None) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyargs, CPU, m) {
  m.impl("score_select", TORCH_BOX(&pyargs::score_select<pyargs::run_on_cpu>));
}

#ifdef PYARGS_CUDA_ARCHS
STABLE_TORCH_LIBRARY_IMPL(pyargs, CUDA, m) {
  m.impl("score_select", TORCH_BOX(&pyargs::score_select<pyargs::run_on_cuda>));
}
#endif

#endif  // PYARGS_HOST
