"""A stand-in for a CUDA graph on a CPU: the operators of a step and the memory they touch, replayed without Python around."""

from __future__ import annotations

import gc

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyargs.decode.backends.capture import NoHostReads, try_out


class Recorder(TorchDispatchMode):
    """Within it every operator is noted. `foreign` are weak references to the memory that the step did not make itself."""

    def __init__(self):
        super().__init__()
        self.calls, self.made, self.foreign = [], {}, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.removeprefix("aten::")
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.made:
                    self.foreign.setdefault(storage._cdata, (StorageWeakRef(storage), name, tuple(tensor.shape)))
        result = function(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.foreign:
                self.made[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        self.calls.append((function, args, kwargs, result))
        return result

    def replay(self) -> None:
        for function, args, kwargs, result in self.calls:
            for kept, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(kept, Tensor) and kept.untyped_storage()._cdata != new.untyped_storage()._cdata:
                    kept.copy_(new)


def capture(step, device: torch.device):
    """In the place of `cuda_graph.capture`: trial steps, the capture (which computes nothing on a GPU), and its replay."""
    try_out(step, device)
    recorder = Recorder()
    with NoHostReads(device.type), recorder:
        step()
    return recorder.replay


def freed(step, device: torch.device, found: list):
    """Notes the memory that the step reads. What of it is gone later, a graph would read all the same."""
    step()
    recorder = Recorder()
    with recorder:
        step()
    recorder.calls.clear()
    found.append(recorder)


def dead(recorder: Recorder) -> list[tuple]:
    gc.collect()
    return [what for reference, *what in recorder.foreign.values() if reference.expired()]
