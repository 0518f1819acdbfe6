// The arguments of user_mlp, which score_select begins with where it has a bank.
#pragma once

#include "../kernels/rows.h"
#include "tensor.h"

namespace pyargs {
namespace {

// Checks the arguments and puts them into `rows`, which they must outlive; returns the number of rows.
int64_t set_user_mlp(UserMlpRows& rows, Array& hidden, Array& bank, Array& user) {
  check(hidden.dim() == 3 && hidden.size(1) >= 1 && hidden.size(2) >= 1, "hidden must be [B, k, D], k and D >= 1");
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
  return batch;
}

}  // namespace
}  // namespace pyargs
