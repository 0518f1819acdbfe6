"""topk_logprobs: the k most probable tokens of each row, with log-probabilities, in one pass over the logits."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor
from torch.compiler import is_compiling

from pyargs.ops.library import define

MAX_K = 64


def topk_logprobs_reference(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch form of `topk_logprobs`; same arguments, results and errors."""
    check_inputs(logits, k)
    logits = logits.float()
    # A stable sort decides ties: the lower id first. Like torch.topk it ranks NaN above everything.
    ids = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :k].contiguous()
    logprobs = torch.log_softmax(logits, dim=-1).gather(-1, ids)
    return logprobs, ids, torch.logsumexp(logits, dim=-1)


def topk_logprobs(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k most probable tokens of each row.

    Args:
        logits: [B, V], float32, bfloat16 or float16, any row stride. B may be 0. -inf entries are legal.
        k: 1 to 64, at most V.

    Returns:
        logprobs: [B, k] float32, natural logarithms, sorted from high to low.
        ids: [B, k] int64; equal values go by the lower id. NaN ranks above +inf, as in torch.topk.
        logsumexp: [B] float32.

    A row that holds NaN or +inf has NaN log-probabilities, as log_softmax has. A row's result is bitwise the same in any
    batch and with any number of threads. Not differentiable.

    Raises:
        TypeError: logits is not such a tensor, or k not an int.
        ValueError: a shape, k or device that does not fit.
    """
    try:
        return (_op if is_compiling() else _direct)(logits, k)
    except RuntimeError:
        check_inputs(logits, k)
        raise


def check_inputs(logits: Tensor, k: int) -> None:
    """Raises an error that names the fix. The C++ op makes the same checks, with shorter messages."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a torch.Tensor, got {type(logits).__name__}")
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"logits must be float32, bfloat16 or float16, got {logits.dtype}: use logits.float()")
    if isinstance(k, bool) or not isinstance(k, Integral | torch.SymInt):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if logits.dim() != 2:
        raise ValueError(f"logits must be [B, V], got shape {tuple(logits.shape)}: use logits[:, -1] of [B, T, V]")
    if not 1 <= k <= MAX_K:
        raise ValueError(f"k must be 1 to {MAX_K}, got {k}")
    if k > logits.shape[1]:
        raise ValueError(f"k is {k} but logits have only {logits.shape[1]} entries a row: lower k")


def _fake(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    check_inputs(logits, k)
    batch = logits.shape[0]
    return (
        logits.new_empty((batch, k), dtype=torch.float32),
        logits.new_empty((batch, k), dtype=torch.int64),
        logits.new_empty((batch,), dtype=torch.float32),
    )


_op, _direct = define("topk_logprobs", topk_logprobs_reference, _fake)
