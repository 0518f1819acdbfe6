// branch_attention: next tokens behind each row's prefix, each of which sees the prefix and itself. See
// pyargs/ops/branch_attention.py for the contract. On a CPU the reference serves: there the decoder has passes of its
// own.

#include "../kernels/cuda/launch.h"
#include "tensor.h"

namespace pyargs {
namespace {

#ifdef PYARGS_CUDA_ARCHS
// Whether elements of a head lie side by side and every head starts at a multiple of 16 bytes.
bool has_vectors(const Array& array, int64_t size) {
  if (array.stride(3) != 1 || reinterpret_cast<uintptr_t>(array.data()) % 16 != 0) return false;
  for (int64_t d = 0; d < 3; ++d) {
    if (array.size(d) > 1 && array.stride(d) * size % 16 != 0) return false;
  }
  return true;
}

// The handles are ours: boxed arguments come owned, and results are given away.
StableIValue branch_attention_cuda(AtenTensorHandle query_handle, AtenTensorHandle key_handle,
                                   AtenTensorHandle value_handle, AtenTensorHandle length_handle, double scale) {
  Array query(query_handle), key(key_handle), value(value_handle), length(length_handle);
  check_one_device({&query, &key, &value, &length});
  check(query.dim() == 4 && key.dim() == 4 && value.dim() == 4, "query, key and value must be [B, heads, tokens, D]");
  BranchRows rows{};
  rows.dtype = query.float_dtype("query must be float32, bfloat16 or float16");
  const int64_t size = rows.dtype == Dtype::kFloat32 ? 4 : 2;
  check(key.dtype() == query.dtype() && value.dtype() == query.dtype(), "query, key and value must have one dtype");
  const int64_t batch = query.size(0), heads = query.size(1), k = query.size(2), dim = query.size(3);
  const int64_t kept = key.size(1), places = key.size(2);
  check(heads >= 1 && k >= 1, "query must be [B, heads, k, D], heads and k >= 1");
  check(dim >= 8 && dim <= 256 && dim % 8 == 0, "heads must have a multiple of 8 elements, at most 256");
  check(key.size(0) == batch && key.size(3) == dim && kept >= 1 && heads % kept == 0,
        "key must be [B, a divisor of the heads, T, D]");
  for (int64_t d = 0; d < 4; ++d) check(value.size(d) == key.size(d), "value must have the shape of key");
  check(places >= k, "key must have a place for each new token");
  check(heads * k <= INT32_MAX / 2 && places <= INT32_MAX / 2, "too many tokens or places");
  length.require({batch}, aoti_torch_dtype_int64(), "length must be [B] int64");
  if (!has_vectors(query, size)) query.make_contiguous();
  check(has_vectors(key, size) && has_vectors(value, size),
        "heads of key and value must be dense and start at multiples of 16 bytes: call .contiguous() where they are "
        "made");
  rows.query = query.data(), rows.key = key.data(), rows.value = value.data();
  rows.query_stride_b = query.stride(0), rows.query_stride_h = query.stride(1), rows.query_stride_k = query.stride(2);
  rows.key_stride_b = key.stride(0), rows.key_stride_h = key.stride(1), rows.key_stride_t = key.stride(2);
  rows.value_stride_b = value.stride(0), rows.value_stride_h = value.stride(1), rows.value_stride_t = value.stride(2);
  rows.batch = batch, rows.heads = static_cast<int>(kept), rows.groups = static_cast<int>(heads / kept);
  rows.k = static_cast<int>(k), rows.places = static_cast<int>(places), rows.dim = static_cast<int>(dim);
  rows.length = length.data<int64_t>();
  rows.scale = static_cast<float>(scale);
  Result out({batch, k, heads, dim}, query.dtype(), query);
  rows.out = out.data();
  if (batch > 0) {
    Result workspace({static_cast<int64_t>(cuda::branch_workspace_bytes(rows))}, aoti_torch_dtype_uint8(), query);
    check_launch(cuda::branch_attention(rows, workspace.data(), query.device_index(), cuda_stream(query)));
  }
  return out.release();
}
#endif

}  // namespace
}  // namespace pyargs

STABLE_TORCH_LIBRARY_FRAGMENT(PYARGS_OP_NAMESPACE, m) {
  m.def("branch_attention(Tensor query, Tensor key, Tensor value, Tensor length, float scale) -> Tensor");
}

#ifdef PYARGS_CUDA_ARCHS
STABLE_TORCH_LIBRARY_IMPL(PYARGS_OP_NAMESPACE, CUDA, m) {
  m.impl("branch_attention", TORCH_BOX(&pyargs::branch_attention_cuda));
}
#endif
