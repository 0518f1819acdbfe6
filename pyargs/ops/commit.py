"""commit: the chosen branch becomes the prefix's next token, in the keys and values of all layers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from pyargs.ops.library import define, device_of

MOST = 256  # tensors of one call: keys and values of 128 layers


def commit_reference(states: list[Tensor], slot: Tensor, length: Tensor) -> None:
    """Plain PyTorch form of `commit`; same arguments, effect and errors."""
    check_inputs(states, slot, length)
    to = length.where(slot >= 0, 0)  # new tensors: slot and length may be views of the states
    at = to + slot.clamp(min=0)
    to, at = (place.view(-1, 1, 1, 1).expand_as(states[0][:, :, :1]) for place in (to, at))
    for tensor in states:
        tensor.scatter_(2, to, tensor.gather(2, at))


def commit(states: list[Tensor], slot: Tensor, length: Tensor) -> None:
    """`states[i][b, :, length[b]] = states[i][b, :, length[b] + slot[b]]` for all tensors at once, in place.

    Args:
        states: 1 to 256 tensors [B, heads, capacity, head_dim] of one shape, layout and dtype: the keys and values of all
            layers, with each row's branches behind its prefix. The last dimension must be dense.
        slot: [B] int64, the branch that stays, as `score_select` gives it; -1 (no choice) leaves the row as it is.
        length: [B] int64 on the states' device, the length of each row's prefix: a captured graph need not know it. It is
            not read where slot is -1.

    Raises:
        TypeError, ValueError: a dtype, shape, layout or device that does not fit.
        RuntimeError: what torch refuses to change in place: states that require grad in grad mode, expanded ones, inference
        tensors outside of inference mode. On the CPU also a length or slot beyond the capacity; on CUDA, where nothing can
        be raised without waiting, such a row is left as it is.
    """
    try:
        (_op if is_compiling() else _direct)(states, slot, length)
    except RuntimeError:
        check_inputs(states, slot, length)
        raise


def check_inputs(states, slot, length) -> None:
    """Raises an error that names the fix. The C++ op makes the same checks, with shorter messages."""
    if not isinstance(states, (list, tuple)) or not 1 <= len(states) <= MOST:
        raise ValueError(f"states must be a list of 1 to {MOST} tensors")
    for tensor in (*states, slot, length):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"states, slot and length must be torch.Tensors, got {type(tensor).__name__}")
    first = states[0]
    if first.dim() != 4:
        raise ValueError(f"states must be [B, heads, capacity, head_dim], got shape {tuple(first.shape)}")
    for i, tensor in enumerate(states):
        if (tensor.shape, tensor.stride(), tensor.dtype) != (first.shape, first.stride(), first.dtype):
            raise ValueError(f"states[{i}] is {tuple(tensor.shape)} {tensor.dtype}, not like states[0]: they must be alike")
    if first.stride(3) != 1 and first.shape[3] != 1:
        raise ValueError("the last dimension of states must be dense: call .contiguous() where they are made")
    if slot.dtype != torch.int64 or length.dtype != torch.int64:
        raise TypeError(f"slot and length must be int64, got {slot.dtype} and {length.dtype}")
    for name, tensor in {"slot": slot, "length": length}.items():
        if tensor.shape != first.shape[:1]:
            raise ValueError(f"{name} must have shape [{first.shape[0]}], one for each row, got {list(tensor.shape)}")
    device_of(states=first, slot=slot, length=length)


def _fake(states: list[Tensor], slot: Tensor, length: Tensor) -> None:
    check_inputs(states, slot, length)


_op, _direct = define("commit", commit_reference, _fake, mutates=("states",))
