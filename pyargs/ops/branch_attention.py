"""branch_attention: next tokens behind each row's prefix, each of which sees the prefix and itself. No mask is made."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor
from torch.compiler import is_compiling

from pyargs.ops.library import define, device_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MOST_ELEMENTS = 256
"""Of a head."""


def branch_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, length: Tensor, scale: float | None = None
) -> Tensor:
    """Plain PyTorch form of `branch_attention`, with a mask; same arguments, results and errors."""
    check_inputs(query, key, value, length)
    return _dense(query, key, value, length, scale_of(query, scale))


def _dense(query: Tensor, key: Tensor, value: Tensor, length: Tensor, scale: float) -> Tensor:
    (batch, heads, k, dim), (_, kept, places, _) = query.shape, key.shape
    place, start = torch.arange(places, device=query.device), length[:, None, None]
    seen = (place < start) | (place == start + torch.arange(k, device=query.device).unsqueeze(1))  # [B, k, T]
    seen = seen[:, None, None]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    groups = query.to(wide).reshape(batch, kept, heads // kept, k, dim)
    scores = groups @ key.to(wide).unsqueeze(2).transpose(-1, -2) * scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    # A weight of 0 would not do: what a query does not see may be no number.
    values = value.to(wide)[:, :, None, None].masked_fill(~seen.unsqueeze(-1), 0.0)
    out = (weights.unsqueeze(-2) @ values).squeeze(-2).reshape(query.shape)
    known = (length >= 0) & (length <= places - k)
    return out.masked_fill(~known[:, None, None, None], math.nan).to(query.dtype).transpose(1, 2).contiguous()


def branch_attention(query: Tensor, key: Tensor, value: Tensor, length: Tensor, scale: float | None = None) -> Tensor:
    """Attention of k queries a row: query j of row b sees the keys 0 to length[b] - 1, and the key length[b] + j.

    So lie the keys of a `RowCache` in a pass over k next tokens of each row, the single next token (k = 1) among them.

    Args:
        query: [B, heads, k, D] float32, bfloat16 or float16; on a CPU also float64. D is a multiple of 8, at most 256.
        key: [B, kept heads, T, D] of the same dtype, T >= k. Query head h has the keys of head h // (heads / kept heads).
        value: as key.
        length: [B] int64 on the same device, 0 to T - k: a captured graph need not know it.
        scale: of the scores, D^-0.5 by default.

    On CUDA the rows of key and value must start at multiples of 16 bytes, and their last dimension be dense; a query that does
    not is copied.

    Returns:
        [B, k, heads, D], dense. On CUDA a query's result is bitwise the same in any batch, with any T and any other branches.

    A length out of range does not raise, for a decoding loop on a device cannot: the row's output is NaN. What a query does
    not see does not matter, even if it is no number. Not differentiable.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit.
        RuntimeError: on CUDA, float64, heads of more than 128 elements but in bfloat16, or keys and values that lie otherwise.
    """
    try:
        return (_op if is_compiling() else _direct)(query, key, value, length, scale_of(query, scale))
    except RuntimeError:
        check_inputs(query, key, value, length)
        raise


def scale_of(query: Tensor, scale: float | None) -> float:
    if scale is None:
        return query.shape[-1] ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}")
    return float(scale)


def check_inputs(query: Tensor, key: Tensor, value: Tensor, length: Tensor) -> None:
    """Raises an error that names the fix. The C++ op makes the same checks, with shorter messages."""
    for name, tensor in (("query", query), ("key", key), ("value", value), ("length", length)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if query.dtype not in (*FLOATS, torch.float64):
        raise TypeError(f"query must be float32, bfloat16, float16 or (on a CPU) float64, got {query.dtype}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} is {tensor.dtype} but query {query.dtype}: attention has one dtype")
    if length.dtype != torch.int64:
        raise TypeError(f"length must be int64, got {length.dtype}")
    if query.dim() != 4 or query.shape[1] < 1 or query.shape[2] < 1:
        raise ValueError(f"query must be [B, heads, k, D] with heads and k >= 1, got shape {tuple(query.shape)}")
    batch, heads, k, dim = query.shape
    if dim % 8 or not 8 <= dim <= MOST_ELEMENTS:
        raise ValueError(f"heads must have a multiple of 8 elements, at most {MOST_ELEMENTS}, got {dim}")
    if key.dim() != 4 or key.shape[0] != batch or key.shape[3] != dim or key.shape[1] < 1 or heads % key.shape[1]:
        raise ValueError(f"key must be [{batch}, a divisor of {heads}, T, {dim}], got {list(key.shape)}")
    if key.shape[2] < k:
        raise ValueError(f"key has {key.shape[2]} places, but there are {k} new tokens, which stand there too")
    if value.shape != key.shape:
        raise ValueError(f"value must have the shape of key, {list(key.shape)}, got {list(value.shape)}")
    if length.dim() != 1 or len(length) != batch:
        raise ValueError(f"length must have shape [{batch}], one for each row, got {list(length.shape)}")
    device_of(query=query, key=key, value=value, length=length)


def _default(query: Tensor, key: Tensor, value: Tensor, length: Tensor, scale: float) -> Tensor:
    return branch_attention_reference(query, key, value, length, scale)


def _fake(query: Tensor, key: Tensor, value: Tensor, length: Tensor, scale: float) -> Tensor:
    check_inputs(query, key, value, length)
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], query.shape[3]))


_op, _direct = define("branch_attention", _default, _fake)
