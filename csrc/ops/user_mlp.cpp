// user_mlp: the first layer of every row's own MLP. See pyargs/ops/user_mlp.py for the contract.

#include "../kernels/cpu/launch.h"
#include "../kernels/cuda/launch.h"
#include "tensor.h"

namespace pyargs {
namespace {

using Run = void (*)(const UserMlpRows&, int64_t batch, const Array& like);

void run_on_cpu(const UserMlpRows& rows, int64_t batch, const Array&) {
  const int64_t blocks = batch * ((rows.units + kMlpUnits - 1) / kMlpUnits);
  const int64_t grain = 1 + (1 << 18) / (rows.k * rows.dim * kMlpUnits);  // less is not worth waking a thread
  if (blocks <= grain) {
    PYARGS_DISPATCH(user_mlp, rows, 0, blocks);
  } else {
    torch::stable::parallel_for(0, blocks, grain,
                                [&rows](int64_t begin, int64_t end) { PYARGS_DISPATCH(user_mlp, rows, begin, end); });
  }
}

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
  check(hidden.dim() == 3 && hidden.size(1) >= 1 && hidden.size(2) >= 1, "hidden must be [B, k, D], k and D >= 1");
  UserMlpRows rows{};
  const int64_t batch = hidden.size(0);
  rows.k = hidden.size(1);
  rows.dim = hidden.size(2);
  check(bank.dim() == 3 && bank.size(0) >= 1 && bank.size(1) >= 1 && bank.size(2) == rows.dim,
        "bank must be [U, H, D], U and H >= 1");
  rows.users = bank.size(0);
  rows.units = bank.size(1);
  rows.hidden_dtype = hidden.float_dtype("hidden must be float32, bfloat16 or float16");
  rows.bank_dtype = bank.float_dtype("bank must be float32, bfloat16 or float16");
  user.require({batch}, aoti_torch_dtype_int64(), "user must be [B] int64");
  hidden.require_dense_rows();
  bank.require_dense_rows();
  rows.hidden = hidden.data();
  rows.hidden_stride_b = hidden.stride(0);
  rows.hidden_stride_k = hidden.stride(1);
  rows.bank = bank.data();
  rows.bank_stride_u = bank.stride(0);
  rows.bank_stride_h = bank.stride(1);
  rows.user = user.data<int64_t>();

  Result out({batch, rows.k, rows.units}, aoti_torch_dtype_float32(), hidden);
  rows.out = out.data<float>();

  if (batch > 0) run(rows, batch, hidden);
  return out.release();
}

}  // namespace
}  // namespace pyargs

STABLE_TORCH_LIBRARY_FRAGMENT(pyargs, m) { m.def("user_mlp(Tensor hidden, Tensor bank, Tensor user) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(pyargs, CPU, m) { m.impl("user_mlp", TORCH_BOX(&pyargs::user_mlp<pyargs::run_on_cpu>)); }

#ifdef PYARGS_CUDA_ARCHS
STABLE_TORCH_LIBRARY_IMPL(pyargs, CUDA, m) { m.impl("user_mlp", TORCH_BOX(&pyargs::user_mlp<pyargs::run_on_cuda>)); }
#endif
