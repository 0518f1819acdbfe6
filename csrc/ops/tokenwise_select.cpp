// tokenwise_select: from two rows of logits to the token. See pyargs/ops/tokenwise_select.py for the contract.

#include "../kernels/cuda/launch.h"
#include "choice.h"
#include "scan.h"
#include "tensor.h"

namespace pyargs {
namespace {

using Handle = AtenTensorHandle;

using Run = void (*)(const TokenwiseRows&, int64_t batch, const Array& like);

void run_on_cpu(const TokenwiseRows& rows, int64_t batch, const Array&) { cpu::tokenwise_select(rows, batch); }

#ifdef PYARGS_CUDA_ARCHS
void run_on_cuda(const TokenwiseRows& rows, int64_t batch, const Array& like) {
  const int64_t bytes = static_cast<int64_t>(cuda::topk_workspace_bytes(2 * batch, rows.policy.vocab));
  Result workspace({bytes}, aoti_torch_dtype_uint8(), like);
  check_launch(cuda::tokenwise_select(rows, batch, workspace.data(), like.device_index(), cuda_stream(like)));
}
#endif

// Checks both logits and puts them into `rows`, which the arrays must outlive; returns the number of rows.
int64_t set_logits(TokenwiseRows& rows, Array& logits, Array& reward_logits, int64_t k) {
  rows.k = k;
  rows.policy = logit_rows(logits, k);
  rows.rewards = logit_rows(reward_logits, k);
  const int64_t batch = logits.size(0);
  check(reward_logits.size(0) == batch && rows.rewards.vocab == rows.policy.vocab,
        "logits and reward_logits must have one shape");
  return batch;
}

// The handles are ours: boxed arguments come owned, and results are given away.
template <Run run>
std::tuple<StableIValue, StableIValue, StableIValue, StableIValue> tokenwise_select(
    Handle logits_handle, Handle reward_logits_handle, Handle reward_weight_handle, Handle finished_handle, int64_t k,
    std::optional<Handle> stop_handle, int64_t pad_id, std::optional<double> temperature,
    std::optional<Handle> uniform_handle, std::optional<Handle> count_handle,
    std::optional<Handle> row_temperature_handle) {
  Array logits(logits_handle), reward_logits(reward_logits_handle), reward_weight(reward_weight_handle),
      finished(finished_handle);
  std::optional<Array> stop = array_or_none(stop_handle), uniform = array_or_none(uniform_handle),
                       count = array_or_none(count_handle), row_temperature = array_or_none(row_temperature_handle);
#ifdef PYARGS_CUDA_ARCHS
  if (run == run_on_cuda) {
    check_one_device({&logits, &reward_logits, &reward_weight, &finished, given(stop), given(uniform), given(count),
                      given(row_temperature)});
  }
#endif
  TokenwiseRows rows{};
  const int64_t batch = set_logits(rows, logits, reward_logits, k);
  set_choice(rows, batch, reward_weight, finished, stop, pad_id, temperature, uniform, count, row_temperature);
  ChoiceResults results(rows, batch, logits);
  if (batch > 0) run(rows, batch, logits);
  return results.release();
}

template <Run run>
void tokenwise_step(Handle logits_handle, Handle reward_logits_handle, int64_t k, PYARGS_STATE_PARAMETERS,
                    int64_t pad_id) {
  Array logits(logits_handle), reward_logits(reward_logits_handle);
  State state(PYARGS_STATE_ARGUMENTS);
#ifdef PYARGS_CUDA_ARCHS
  if (run == run_on_cuda) {
    check_one_device({&logits, &reward_logits});
    state.check_device(logits);
  }
#endif
  check(!so_far && !total, "a stop token has its own reward here: leave out so_far and total");
  TokenwiseRows rows{};
  const int64_t batch = set_logits(rows, logits, reward_logits, k);
  state.set(rows, batch, pad_id);
  if (batch > 0) run(rows, batch, logits);
}

}  // namespace
}  // namespace pyargs

STABLE_TORCH_LIBRARY_FRAGMENT(PYARGS_OP_NAMESPACE, m) {
  m.def(
      "tokenwise_select(Tensor logits, Tensor reward_logits, Tensor reward_weight, Tensor finished, SymInt k, "
      "Tensor? stop=None, SymInt pad_id=0, float? temperature=None, Tensor? uniform=None, Tensor? count=None, "
      "Tensor? row_temperature=None) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("tokenwise_step(Tensor logits, Tensor reward_logits, SymInt k, " PYARGS_STATE_SCHEMA
        ", SymInt pad_id=0) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(PYARGS_OP_NAMESPACE, CPU, m) {
  m.impl("tokenwise_select", TORCH_BOX(&pyargs::tokenwise_select<pyargs::run_on_cpu>));
  m.impl("tokenwise_step", TORCH_BOX(&pyargs::tokenwise_step<pyargs::run_on_cpu>));
}

#ifdef PYARGS_CUDA_ARCHS
STABLE_TORCH_LIBRARY_IMPL(PYARGS_OP_NAMESPACE, CUDA, m) {
  m.impl("tokenwise_select", TORCH_BOX(&pyargs::tokenwise_select<pyargs::run_on_cuda>));
  m.impl("tokenwise_step", TORCH_BOX(&pyargs::tokenwise_step<pyargs::run_on_cuda>));
}
#endif
