"""A pass in float32 through a model of bfloat16 or float16, to see what their rounding would hide: another formula."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

HALVES = torch.bfloat16, torch.float16


class InFloat32(TorchDispatchMode):
    """Within it, and in this thread only, operators take and give float32 in the place of bfloat16 and float16. The model
    stays as it is: each weight is converted where it is used, and what came of it is forgotten.

    An operator that knows no float32 raises what it always does. What is written to keeps its dtype.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.is_view:
            return function(*args, **kwargs)
        if function is torch.ops.aten.embedding.default:  # of a large table a few rows
            return _wide(function(*args, **kwargs))
        arguments = function._schema.arguments
        written = {one.name for one in arguments if one.alias_info is not None and one.alias_info.is_write}
        named = [*zip([one.name for one in arguments], args, strict=False), *kwargs.items()]
        taken = [value if name in written else tree_map(_wide, value) for name, value in named]
        return function(*taken[: len(args)], **dict(zip(kwargs, taken[len(args) :], strict=True)))


def _wide(value):
    if isinstance(value, Tensor):
        return value.float() if value.dtype in HALVES else value
    return torch.float32 if value in HALVES else value
