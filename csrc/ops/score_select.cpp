// score_select: the rewards of the candidates and the choice; score_step: the same, with what rows keep. See
// pyargs/ops/score_select.py and score_step.py for the contracts.

#include <algorithm>

#include "../kernels/cuda/launch.h"
#include "choice.h"
#include "tensor.h"
#include "user_mlp.h"

namespace pyargs {
namespace {

using Handle = AtenTensorHandle;

// With a bank the features are what comes out of `first`.
struct Scored : ScoreRows {
  UserMlpRows first;
};

using Run = void (*)(Scored&, int64_t batch, const Array& like);

void run_on_cpu(Scored& rows, int64_t batch, const Array& like) {
  std::optional<Result> features;
  if (rows.first.bank) {
    features.emplace(std::initializer_list<int64_t>{batch, rows.k, rows.hidden}, aoti_torch_dtype_float32(), like);
    rows.first.out = features->data<float>();
    cpu::user_mlp(rows.first, batch);
    rows.features = rows.first.out;
    rows.features_dtype = Dtype::kFloat32;
    rows.features_stride_k = rows.hidden;
    rows.features_stride_b = rows.k * rows.hidden;
  }
  cpu::score_select(rows, batch);
}

#ifdef PYARGS_CUDA_ARCHS
void run_on_cuda(Scored& rows, int64_t batch, const Array& like) {
  check(rows.k <= kMaxTopK, "k must be at most 64 on CUDA");
  if (!rows.first.bank) return check_launch(cuda::score_select(rows, batch, like.device_index(), cuda_stream(like)));
  const int64_t bytes = static_cast<int64_t>(cuda::user_mlp_select_workspace_bytes(rows.first, batch));
  Result workspace({bytes}, aoti_torch_dtype_uint8(), like);
  check_launch(
      cuda::user_mlp_select(rows, rows.first, batch, workspace.data(), like.device_index(), cuda_stream(like)));
}
#endif

// Checks what is scored and puts it into `rows`, which the arrays must outlive; returns the number of rows.
int64_t set_scored(Scored& rows, Array& features, Array& weight, Array& user, Array& logprobs, Array& ids,
                   std::optional<Array>& bias, std::optional<Array>& bank, int64_t activation, double scale) {
  const int32_t int64 = aoti_torch_dtype_int64(), float32 = aoti_torch_dtype_float32();
  check(features.dim() == 3, "features must be [B, k, H]");
  const int64_t batch = features.size(0);
  rows.k = features.size(1);
  if (bank) set_user_mlp(rows.first, features, *bank, user);
  rows.hidden = bank ? rows.first.units : features.size(2);
  check(rows.k >= 1 && rows.hidden >= 1, "features must have k >= 1 and H >= 1");
  check(rows.k < INT32_MAX, "k must be less than 2^31 - 1");
  features.require_dense_rows();
  rows.features_dtype = features.float_dtype("features must be float32, bfloat16 or float16");
  const auto check_table = [&](Array& table, const char* message) {
    check(table.dim() == 2 && table.size(0) >= 1 && table.size(1) == rows.hidden, message);
    table.require_dense_rows();
    return table.float_dtype(message);
  };
  rows.weight_dtype = check_table(weight, "weight must be [W, H] float32, bfloat16 or float16");
  rows.weight_rows = weight.size(0);
  rows.bias_rows = 1;
  if (bias) {
    rows.bias_dtype = check_table(*bias, "bias must be [U, H] float32, bfloat16 or float16");
    rows.bias_rows = bias->size(0);
    rows.bias = bias->data();
    rows.bias_stride = bias->stride(0);
  }
  const int64_t bank_rows = rows.bank_rows = bank ? rows.first.users : 1;
  const int64_t users = std::max({rows.weight_rows, rows.bias_rows, bank_rows});
  for (const int64_t several : {rows.weight_rows, rows.bias_rows, bank_rows}) {
    check(several == 1 || several == users, "weight, bias and bank must have as many rows, or a single one");
  }
  user.require({batch}, int64, "user must be [B] int64");
  rows.logprobs_stride = logprobs.require_rows({batch, rows.k}, float32, "logprobs must be [B, k] float32");
  rows.ids_stride = ids.require_rows({batch, rows.k}, int64, "ids must be [B, k] int64");
  check(activation >= 0 && activation <= 3, "activation must be 0 identity, 1 relu, 2 gelu or 3 leaky_relu");
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
  return batch;
}

// The handles are ours: boxed arguments come owned, and results are given away.
template <Run run>
std::tuple<StableIValue, StableIValue, StableIValue, StableIValue> score_select(
    Handle features_handle, Handle weight_handle, Handle user_handle, Handle reward_weight_handle,
    Handle logprobs_handle, Handle ids_handle, Handle finished_handle, std::optional<Handle> bias_handle,
    int64_t activation, double scale, std::optional<Handle> stop_handle, std::optional<Handle> stop_reward_handle,
    int64_t pad_id, std::optional<double> temperature, std::optional<Handle> uniform_handle,
    std::optional<Handle> count_handle, std::optional<Handle> row_temperature_handle,
    std::optional<Handle> bank_handle) {
  Array features(features_handle), weight(weight_handle), user(user_handle), reward_weight(reward_weight_handle),
      logprobs(logprobs_handle), ids(ids_handle), finished(finished_handle);
  std::optional<Array> bias = array_or_none(bias_handle), stop = array_or_none(stop_handle),
                       stop_reward = array_or_none(stop_reward_handle), uniform = array_or_none(uniform_handle),
                       count = array_or_none(count_handle), row_temperature = array_or_none(row_temperature_handle),
                       bank = array_or_none(bank_handle);
#ifdef PYARGS_CUDA_ARCHS
  if (run == run_on_cuda) {
    check_one_device({&features, &weight, &user, &reward_weight, &logprobs, &ids, &finished, given(bias), given(stop),
                      given(stop_reward), given(uniform), given(count), given(row_temperature), given(bank)});
  }
#endif
  Scored rows{};
  const int64_t batch = set_scored(rows, features, weight, user, logprobs, ids, bias, bank, activation, scale);
  set_choice(rows, batch, reward_weight, finished, stop, pad_id, temperature, uniform, count, row_temperature);
  if (stop_reward) {
    check(stop.has_value(), "stop_reward needs stop");
    stop_reward->require({batch}, aoti_torch_dtype_float32(), "stop_reward must be [B] float32");
    rows.stop_reward = stop_reward->data<float>();
  }
  ChoiceResults results(rows, batch, features);
  if (batch > 0) run(rows, batch, features);
  return results.release();
}

template <Run run>
void score_step(Handle features_handle, Handle weight_handle, Handle user_handle, Handle logprobs_handle,
                Handle ids_handle, PYARGS_STATE_PARAMETERS, std::optional<Handle> bias_handle, int64_t activation,
                double scale, int64_t pad_id, std::optional<Handle> bank_handle) {
  Array features(features_handle), weight(weight_handle), user(user_handle), logprobs(logprobs_handle), ids(ids_handle);
  State state(PYARGS_STATE_ARGUMENTS);
  std::optional<Array> bias = array_or_none(bias_handle), bank = array_or_none(bank_handle);
#ifdef PYARGS_CUDA_ARCHS
  if (run == run_on_cuda) {
    check_one_device({&features, &weight, &user, &logprobs, &ids, given(bias), given(bank)});
    state.check_device(features);
  }
#endif
  Scored rows{};
  const int64_t batch = set_scored(rows, features, weight, user, logprobs, ids, bias, bank, activation, scale);
  state.set(rows, batch, pad_id);
  rows.stop_reward = rows.state.so_far;
  if (batch > 0) run(rows, batch, features);
}

}  // namespace
}  // namespace pyargs

STABLE_TORCH_LIBRARY_FRAGMENT(PYARGS_OP_NAMESPACE, m) {
  // All arguments are positional and the activation is a number: keywords and strings cost more than a small kernel.
  m.def(
      "score_select(Tensor features, Tensor weight, Tensor user, Tensor reward_weight, Tensor logprobs, Tensor ids, "
      "Tensor finished, Tensor? bias=None, SymInt activation=0, float scale=1., Tensor? stop=None, "
      "Tensor? stop_reward=None, SymInt pad_id=0, float? temperature=None, Tensor? uniform=None, "
      "Tensor? count=None, Tensor? row_temperature=None, Tensor? bank=None) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("score_step(Tensor features, Tensor weight, Tensor user, Tensor logprobs, Tensor ids, " PYARGS_STATE_SCHEMA
        ", Tensor? bias=None, SymInt activation=0, float scale=1., SymInt pad_id=0, Tensor? bank=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(PYARGS_OP_NAMESPACE, CPU, m) {
  m.impl("score_select", TORCH_BOX(&pyargs::score_select<pyargs::run_on_cpu>));
  m.impl("score_step", TORCH_BOX(&pyargs::score_step<pyargs::run_on_cpu>));
}

#ifdef PYARGS_CUDA_ARCHS
STABLE_TORCH_LIBRARY_IMPL(PYARGS_OP_NAMESPACE, CUDA, m) {
  m.impl("score_select", TORCH_BOX(&pyargs::score_select<pyargs::run_on_cuda>));
  m.impl("score_step", TORCH_BOX(&pyargs::score_step<pyargs::run_on_cuda>));
}
#endif
