"""A step as a CUDA graph, after a trial in which nothing may make the host wait for the device: the capture forbids it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TRIALS = 2
"""Steps before the capture: libraries set themselves up in their first calls, which a capture forbids."""
READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Tags of operators whose result, or its shape, the host has to know."""
COPIES = "aten::_to_copy", "aten::copy_", "aten::_foreach_copy_"
INDEXED = "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"
FROM_HOST = "aten::lift_fresh"
"""What `torch.tensor` says of a tensor that it has made."""


class NoHostReads(TorchDispatchMode):
    """Within it, and in this thread only, RuntimeError names an operator that reads a device's tensors on the host, or copies
    between the two.

    kind: of the device, "cuda". It sees operators of torch from outside: what waits within one, and `torch.cuda.synchronize`,
    the capture itself has to refuse.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._reads(function, args, kwargs):
            raise RuntimeError(f"{function.name()} makes the host wait for the device, or copies between them")
        return function(*args, **kwargs)

    def _reads(self, function, args: tuple, kwargs: dict) -> bool:
        name, tensors = function._schema.name, [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        there = [one.device.type == self.kind for one in tensors]
        if name in COPIES:
            to = kwargs.get("device")
            return len({*there} if to is None else {*there, torch.device(to).type == self.kind}) > 1
        host = [one for one, on_device in zip(tensors, there, strict=True) if not on_device]
        if len(host) == len(tensors):
            return False
        if any(one.ndim for one in host):  # a single number is read where it lies
            return True
        if name in INDEXED:
            given = [one for one in args[1] if one is not None]
            masks = [one for one in given if one.dtype in (torch.bool, torch.uint8)]
            # One mask and one number of the host fill. Otherwise the mask's places are counted, and the number is copied.
            return len(given) > 1 or not masks if host else bool(masks)
        return name == FROM_HOST or not READS.isdisjoint(function.tags)


def capture(step: Callable[[], None], device: torch.device) -> Callable[[], object]:
    """The step as a graph, to be replayed by a call. Raises RuntimeError where it cannot be captured; `try_out` finds most of
    the reasons before the capture, which can leave its stream unusable when it fails midway. By one thread at a time."""
    graph, apart, now = torch.cuda.CUDAGraph(), _apart(device), torch.cuda.current_stream(device)
    apart.wait_stream(now)
    try:
        with torch.cuda.stream(apart):
            try:
                try_out(step, device)
            finally:
                _forget_workspaces()
                now.wait_stream(apart)
            try:
                with torch.cuda.graph(graph, stream=apart, capture_error_mode="thread_local"):
                    step()
            finally:
                _forget_workspaces()
    except BaseException:
        _apart.cache_clear()
        raise
    now.wait_stream(apart)
    return graph.replay


@cache
def _apart(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures: each on which kernels were launched has tickets for good (csrc/kernels/cuda/tickets.h)."""
    return torch.cuda.Stream(device)


def _forget_workspaces() -> None:
    """So that each graph has a workspace of its own. cuBLAS keeps one for each of torch's 32 streams, of 32 MiB on an
    H100. A graph keeps its address: that of the trial would be another graph's, too, and would stay for good.

    All streams lose theirs, and allocate it anew: torch has nothing narrower.
    """
    torch._C._cuda_clearCublasWorkspaces()


def try_out(step: Callable[[], None], device: torch.device) -> None:
    """TRIALS steps, in all of which but the first RuntimeError names the operator that waits for this kind of device."""
    step()
    with NoHostReads(device.type):
        for _ in range(TRIALS - 1):
            step()
