// topk_logprobs: the k most probable tokens of every row. See pyargs/ops/topk_logprobs.py for the contract.

#include "../kernels/cuda/launch.h"
#include "scan.h"
#include "tensor.h"

namespace pyargs {
namespace {

using Results = std::tuple<StableIValue, StableIValue, StableIValue>;

// The handle is ours: boxed arguments come owned, and results are given away.
Results topk_logprobs_cpu(AtenTensorHandle handle, int64_t k) {
  Array logits(handle);
  const LogitRows rows = logit_rows(logits, k);
  const int64_t batch = logits.size(0);
  Result logprobs({batch, k}, aoti_torch_dtype_float32(), logits);
  Result ids({batch, k}, aoti_torch_dtype_int64(), logits);
  Result logsumexp({batch}, aoti_torch_dtype_float32(), logits);
  cpu::topk_logprobs(rows, batch, k, logprobs.data<float>(), ids.data<int64_t>(), logsumexp.data<float>());
  return {logprobs.release(), ids.release(), logsumexp.release()};
}

#ifdef PYARGS_CUDA_ARCHS
Results topk_logprobs_cuda(AtenTensorHandle handle, int64_t k) {
  Array logits(handle);
  const LogitRows rows = logit_rows(logits, k);
  const int64_t batch = logits.size(0);
  Result logprobs({batch, k}, aoti_torch_dtype_float32(), logits);
  Result ids({batch, k}, aoti_torch_dtype_int64(), logits);
  Result logsumexp({batch}, aoti_torch_dtype_float32(), logits);
  if (batch > 0) {
    const int64_t bytes = static_cast<int64_t>(cuda::topk_workspace_bytes(batch, rows.vocab));
    Result workspace({bytes}, aoti_torch_dtype_uint8(), logits);
    check_launch(cuda::topk_logprobs(rows.logits, rows.dtype, batch, rows.vocab, rows.row_stride, static_cast<int>(k),
                                     logprobs.data<float>(), ids.data<int64_t>(), logsumexp.data<float>(),
                                     workspace.data(), logits.device_index(), cuda_stream(logits)));
  }
  return {logprobs.release(), ids.release(), logsumexp.release()};
}
#endif

}  // namespace
}  // namespace pyargs

STABLE_TORCH_LIBRARY_FRAGMENT(PYARGS_OP_NAMESPACE, m) {
  m.def("topk_logprobs(Tensor logits, SymInt k) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(PYARGS_OP_NAMESPACE, CPU, m) {
  m.impl("topk_logprobs", TORCH_BOX(&pyargs::topk_logprobs_cpu));
}

#ifdef PYARGS_CUDA_ARCHS
STABLE_TORCH_LIBRARY_IMPL(PYARGS_OP_NAMESPACE, CUDA, m) {
  m.impl("topk_logprobs", TORCH_BOX(&pyargs::topk_logprobs_cuda));
}
#endif
