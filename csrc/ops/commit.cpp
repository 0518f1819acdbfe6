// commit: of the branches that stand behind every row's prefix, the chosen one becomes the prefix's next token, in the
// keys and values of all layers at once. See pyargs/ops/commit.py for the contract.

#include "../kernels/cuda/launch.h"
#include "tensor.h"

namespace pyargs {
namespace {

using Run = void (*)(const CommitRows&, int64_t capacity, const Array& like);

void run_on_cpu(const CommitRows& rows, int64_t capacity, const Array&) { cpu::commit(rows, capacity); }

#ifdef PYARGS_CUDA_ARCHS
void run_on_cuda(const CommitRows& rows, int64_t capacity, const Array& like) {
  check_launch(cuda::commit(rows, capacity, like.device_index(), cuda_stream(like)));
}
#endif

template <Run run>
void commit(std::vector<torch::stable::Tensor> states, AtenTensorHandle slot_handle, AtenTensorHandle length_handle) {
  Array slot(slot_handle), length(length_handle);
  check(!states.empty(), "states must hold at least one tensor");
  check(states.size() <= kMaxCommitted, "at most 256 tensors of states");
  CommitRows rows{};
  const torch::stable::Tensor& first = states[0];
  check(first.dim() == 4, "states must be [B, heads, capacity, head_dim]");
  const int64_t size = static_cast<int64_t>(first.element_size());
  rows.batch = first.size(0);
  rows.heads = first.size(1);
  rows.stride_b = first.stride(0) * size;
  rows.stride_h = first.stride(1) * size;
  rows.stride_t = first.stride(2) * size;
  rows.bytes = first.size(3) * size;
  check(first.stride(3) == 1 || first.size(3) == 1, "the last dimension of states must be dense");
  for (int64_t d = 0; d < 3; ++d) {
    check(first.size(d) < 2 || first.stride(d) != 0,
          "states must not be expanded: several elements share their memory");
  }
  for (const torch::stable::Tensor& tensor : states) {
    bool alike = tensor.dim() == 4 && tensor.scalar_type() == first.scalar_type();
    for (int64_t d = 0; alike && d < 4; ++d)
      alike = tensor.size(d) == first.size(d) && tensor.stride(d) == first.stride(d);
    check(alike, "all states must have one shape, layout and dtype");
    check(tensor.get_device_index() == first.get_device_index(), "all tensors must be on one device");
    rows.states[rows.count++] = tensor.data_ptr();
  }
  slot.require({rows.batch}, aoti_torch_dtype_int64(), "slot must be [B] int64");
  length.require({rows.batch}, aoti_torch_dtype_int64(), "length must be [B] int64");
#ifdef PYARGS_CUDA_ARCHS
  if (run == run_on_cuda) {
    check_one_device({&slot, &length});
    check(slot.device_index() == first.get_device_index(), "all tensors must be on one device");
  }
#endif
  rows.slot = slot.data<int64_t>();
  rows.length = length.data<int64_t>();
  if (rows.batch > 0 && rows.heads > 0) run(rows, first.size(2), slot);
}

}  // namespace
}  // namespace pyargs

STABLE_TORCH_LIBRARY_FRAGMENT(PYARGS_OP_NAMESPACE, m) {
  m.def("commit(Tensor(a0!)[] states, Tensor slot, Tensor length) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(PYARGS_OP_NAMESPACE, CPU, m) {
  m.impl("commit", TORCH_BOX(&pyargs::commit<pyargs::run_on_cpu>));
}

#ifdef PYARGS_CUDA_ARCHS
STABLE_TORCH_LIBRARY_IMPL(PYARGS_OP_NAMESPACE, CUDA, m) {
  m.impl("commit", TORCH_BOX(&pyargs::commit<pyargs::run_on_cuda>));
}
#endif
