"""Training on several processes, as `torchrun` or `accelerate launch` start them: each computes its part of every batch.

All of them hold the whole model and see the same batches in the same order. A process takes its part of a batch, and the
gradients of all parts are added up before the optimizer's step, so that the steps are those of one process with the whole
batch. It is not DistributedDataParallel, which knows no sparse gradient of a user table, and no part without pairs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, distributed, nn

from pyargs.errors import PyargsError

WHOLE = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
"""Settings of accelerate under which a process holds a part of the weights."""


def start() -> None:
    """Joins the others. Raises PyargsError for launchers that would split the weights."""
    for name, what in WHOLE.items():
        if os.environ.get(name, "false").lower() == "true":
            raise PyargsError(
                f"{what} splits weights over processes, and rows of users, heads and LoRA are read and written whole: launch "
                "plain data parallel (torchrun, or accelerate launch --multi_gpu). Fix for a backbone that is too large: "
                "gradient_checkpointing, dtype bfloat16, accumulation, or a frozen backbone"
            )
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not distributed.is_initialized():
        from accelerate import PartialState

        PartialState()  # gloo for CPUs, nccl for GPUs; each process takes the GPU of its number


def count() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def number() -> int:
    return distributed.get_rank() if count() > 1 else 0


def part(batch: list | Tensor) -> tuple[list | Tensor, float]:
    """This process's part of a batch, and its share of the pairs. Where there are fewer pairs than processes, some have a pair
    that does not count, with share 0: every process takes part in every step."""
    mine = batch[number() :: count()]
    return (mine, len(mine) / len(batch)) if len(mine) else (batch[:1], 0.0)


@torch.no_grad()
def add_up(parameters: Iterable[nn.Parameter]) -> None:
    """Adds the gradients of all processes, sparse ones too. A parameter has none if it has none in every process."""
    if count() == 1:
        return
    parameters = [p for p in parameters if p.requires_grad]
    kinds = torch.tensor([0 if p.grad is None else 1 + p.grad.is_sparse for p in parameters], device=_device())
    distributed.all_reduce(kinds, distributed.ReduceOp.MAX)
    for p, kind in zip(parameters, kinds.tolist(), strict=True):
        if kind == 2:
            p.grad = _sparse_sum(p)
        elif kind == 1:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            distributed.all_reduce(p.grad)


def _sparse_sum(p: nn.Parameter) -> Tensor:
    """The sum of all processes' sparse gradients of a table: only the rows of users in their parts are sent."""
    own = torch.sparse_coo_tensor(size=p.shape, dtype=p.dtype, device=p.device) if p.grad is None else p.grad
    own = own.coalesce()
    rows = torch.tensor([own.indices().shape[1]], device=p.device)
    all_rows = [torch.zeros_like(rows) for _ in range(count())]
    distributed.all_gather(all_rows, rows)
    most = max(int(one) for one in all_rows)
    indices = own.indices().new_zeros(own.sparse_dim(), most)
    values = own.values().new_zeros(most, *own.values().shape[1:])
    indices[:, : int(rows)], values[: int(rows)] = own.indices(), own.values()
    found = [[torch.zeros_like(mine) for _ in range(count())] for mine in (indices, values)]
    distributed.all_gather(found[0], indices)
    distributed.all_gather(found[1], values)
    return torch.sparse_coo_tensor(
        torch.cat([one[:, : int(n)] for one, n in zip(found[0], all_rows, strict=True)], dim=1),
        torch.cat([one[: int(n)] for one, n in zip(found[1], all_rows, strict=True)]),
        p.shape,
    ).coalesce()


def total(value: float) -> float:
    """The sum of a number over all processes."""
    if count() == 1:
        return value
    found = torch.tensor([value], dtype=torch.float64, device=_device())
    distributed.all_reduce(found)
    return found.item()


@torch.no_grad()
def agree(model: nn.Module) -> None:
    """Gives all processes the first one's trained parameters, whatever each has drawn."""
    if count() > 1:
        for p in model.parameters():
            if p.requires_grad:
                distributed.broadcast(p.data, 0)


def of_first(function: Callable):
    """What the first process's call gives, in all of them."""
    if count() == 1:
        return function()
    found = [function() if number() == 0 else None]
    distributed.broadcast_object_list(found, 0)
    return found[0]


@contextmanager
def within_first(context: Callable[[], AbstractContextManager]) -> Iterator:
    """A context that the first process alone enters, and leaves when all have ended; all get what it gives."""
    if count() == 1:
        with context() as found:
            yield found
        return
    entered = context() if number() == 0 else None
    found = of_first(lambda: entered.__enter__())
    try:
        yield found
        distributed.barrier()
    except BaseException as error:
        if entered is None or not entered.__exit__(type(error), error, error.__traceback__):
            raise
    else:
        if entered is not None:
            entered.__exit__(None, None, None)


def _device() -> torch.device:
    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")
