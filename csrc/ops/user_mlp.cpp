// user_mlp: the first layer of every row's own MLP. See pyargs/ops/user_mlp.py for the contract.

#include "user_mlp.h"

#include "../kernels/cuda/launch.h"

namespace pyargs {
namespace {

using Run = void (*)(const UserMlpRows&, int64_t batch, const Array& like);

void run_on_cpu(const UserMlpRows& rows, int64_t batch, const Array&) { cpu::user_mlp(rows, batch); }

#ifdef PYARGS_CUDA_ARCHS
void run_on_cuda(const UserMlpRows& rows, int64_t batch, const Array& like) {
  check_launch(cuda::user_mlp(rows, batch, like.device_index(), cuda_stream(like)));
}
#endif

// The handles are ours: boxed arguments come owned, and results are given away.
template <Run run>
StableIValue user_mlp(AtenTensorHandle hidden_handle, AtenTensorHandle bank_handle, AtenTensorHandle user_handle) {
  Array hidden(hidden_handle), bank(bank_handle), user(user_handle);
#ifdef PYARGS_CUDA_ARCHS
  if (run == run_on_cuda) check_one_device({&hidden, &bank, &user});
#endif
  UserMlpRows rows{};
  const int64_t batch = set_user_mlp(rows, hidden, bank, user);
  Result out({batch, rows.k, rows.units}, aoti_torch_dtype_float32(), hidden);
  rows.out = out.data<float>();
  if (batch > 0) run(rows, batch, hidden);
  return out.release();
}

}  // namespace
}  // namespace pyargs

STABLE_TORCH_LIBRARY_FRAGMENT(PYARGS_OP_NAMESPACE, m) {
  m.def("user_mlp(Tensor hidden, Tensor bank, Tensor user) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(PYARGS_OP_NAMESPACE, CPU, m) {
  m.impl("user_mlp", TORCH_BOX(&pyargs::user_mlp<pyargs::run_on_cpu>));
}

#ifdef PYARGS_CUDA_ARCHS
STABLE_TORCH_LIBRARY_IMPL(PYARGS_OP_NAMESPACE, CUDA, m) {
  m.impl("user_mlp", TORCH_BOX(&pyargs::user_mlp<pyargs::run_on_cuda>));
}
#endif
