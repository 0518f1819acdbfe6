"""user_mlp: the first layer of each row's own MLP, read from a bank of all users' matrices without a copy of any."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.compiler import is_compiling

from pyargs.ops.library import define, device_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def user_mlp_reference(hidden: Tensor, bank: Tensor, user: Tensor) -> Tensor:
    """Plain PyTorch form of `user_mlp`; same arguments, results and errors."""
    check_inputs(hidden, bank, user)
    users = bank.shape[0]
    bad_user = (user < 0) | (user >= users) if users > 1 else torch.zeros_like(user, dtype=torch.bool)
    row = user.masked_fill(bad_user, 0) if users > 1 else torch.zeros_like(user)
    matrices = bank[row] if users > 1 else bank.expand(len(row), -1, -1)  # a shared one is not copied
    out = torch.bmm(hidden.float(), matrices.float().transpose(1, 2))
    return out.masked_fill(bad_user[:, None, None], math.nan)


def user_mlp(hidden: Tensor, bank: Tensor, user: Tensor) -> Tensor:
    """Every candidate through its row's user's matrix: `out[b, j, h] = sum_d bank[user[b], h, d] * hidden[b, j, d]`.

    The first layer of a per-user MLP. Bias, activation and last layer are then `score_select`'s: out as `features`, with
    a per-user `bias` and `weight`.

    Args:
        hidden: [B, k, D] float32, bfloat16 or float16; k, D >= 1, B may be 0.
        bank: [U, H, D], U and H >= 1. Dtypes may be mixed; sums are float32. With U = 1 all rows share the one matrix.
        user: [B] int64, rows of the bank. Not read where U = 1.

    Strides may be any, but where the last dimension of hidden or bank is not dense, the whole tensor is copied first.

    Returns:
        [B, k, H] float32. A row's result is bitwise the same in any batch and with any number of threads. On CUDA it is
        rounded otherwise where k > 12 and hidden and bank have one 16-bit dtype: tensor cores then multiply.

    A user row out of range does not raise, for a decoding loop on a device cannot: its output is NaN, and score_select
    then flags the row. Not differentiable: training uses plain PyTorch.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit.
    """
    try:
        return (_op if is_compiling() else _direct)(hidden, bank, user)
    except RuntimeError:
        check_inputs(hidden, bank, user)
        raise


def check_inputs(hidden: Tensor, bank: Tensor, user: Tensor) -> None:
    """Raises an error that names the fix. The C++ op makes the same checks, with shorter messages."""
    for name, tensor, dtypes in (("hidden", hidden, FLOATS), ("bank", bank, FLOATS), ("user", user, (torch.int64,))):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name} must be {' or '.join(str(d)[6:] for d in dtypes)}, got {tensor.dtype}")
    if hidden.dim() != 3 or hidden.shape[1] < 1 or hidden.shape[2] < 1:
        raise ValueError(f"hidden must be [B, k, D] with k >= 1 and D >= 1, got shape {tuple(hidden.shape)}")
    if bank.dim() != 3 or bank.shape[0] < 1 or bank.shape[1] < 1:
        raise ValueError(f"bank must be [U, H, D] with U >= 1 and H >= 1, got shape {tuple(bank.shape)}")
    if bank.shape[2] != hidden.shape[2]:
        raise ValueError(
            f"hidden has D = {hidden.shape[2]} but bank {bank.shape[2]}: a user's matrix is [H, D], as nn.Linear.weight is"
        )
    if user.dim() != 1 or user.shape[0] != hidden.shape[0]:
        raise ValueError(f"user must have shape [{hidden.shape[0]}], one for each row of hidden, got {list(user.shape)}")
    device_of(hidden=hidden, bank=bank, user=user)


def _fake(hidden: Tensor, bank: Tensor, user: Tensor) -> Tensor:
    check_inputs(hidden, bank, user)
    return hidden.new_empty((hidden.shape[0], hidden.shape[1], bank.shape[1]), dtype=torch.float32)


_op, _direct = define("user_mlp", user_mlp_reference, _fake)
