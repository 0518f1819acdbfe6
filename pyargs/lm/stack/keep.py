"""One packed stack for each model that is alive, as long as there is memory and its weights do not change."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from weakref import WeakKeyDictionary

import psutil
from torch import nn

from pyargs.errors import PyargsError
from pyargs.lm import lora
from pyargs.lm.bits import held, held_base
from pyargs.lm.stack.pack import check_supported, pack, parts_of, with_delta
from pyargs.lm.stack.run import Stack
from pyargs.lm.structure import contents, eager, structure
from pyargs.ops.library import has_extension


def can_pack(model: nn.Module) -> bool:
    """Whether `pack` takes the model, and there is memory for a second copy of its weights. Raises as `refusal`."""
    return refusal(model) is None


def refusal(model: nn.Module) -> str | None:
    """Why the stack cannot compute this model as it is now on this machine; None if it can.

    Raises PyargsError with the reason for a model that was loaded for the stack alone (`pyargs.lm.bits`).
    """
    why, few = _refusal(model), held(model)
    if why is not None and few is not None:
        raise PyargsError(f"dtype={few.dtype!r} is for the CPU stack alone, which cannot compute this model: {why}")
    return why


def _refusal(model: nn.Module) -> str | None:
    if eager():
        return "PYARGS_BACKEND=eager asks for transformers' own passes"
    if not has_extension:
        return "the extension pyargs._C is not built for this machine"
    decoder, head = parts_of(model)
    try:
        check_supported(decoder, head, decoder.get_input_embeddings().weight.dtype, structure(model))
    except PyargsError as error:
        return str(error)
    needed = 1.2 * sum(p.numel() * p.element_size() for p in model.parameters()) + (
        0 if head is None else 1.2 * head.weight.numel()
    )
    if decoder not in _stacks and needed >= (left := available_memory()):
        return f"its packed weights need {needed / 2**30:.1f} GiB, and {left / 2**30:.1f} GiB are left"
    return None


CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Free bytes of the machine, or of the container if that has fewer; cached files count as free."""
    left = [psutil.virtual_memory().available]
    for limit, used, stat, of in (  # control groups, version 2 and 1
        ("memory.max", "memory.current", "memory.stat", ""),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_"),
    ):
        with suppress(OSError, KeyError, ValueError):  # no such group, or its limit is "max"
            files = dict(line.split() for line in (CGROUP / stat).read_text().splitlines())
            files = int(files[f"{of}active_file"]) + int(files[f"{of}inactive_file"])
            left.append(int((CGROUP / limit).read_text()) - int((CGROUP / used).read_text()) + files)
    return min(left)


def cpu_quota() -> float | None:
    """How many cores' time the container may use; None without a limit. Threads beyond it are stopped for the rest of each
    period, and a pass waits for them."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # control groups, version 2 and 1
        with suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = " ".join((CGROUP / file).read_text() for file in files).split()
            if quota not in ("max", "-1"):
                return int(quota) / int(period)
    return None


def limit_threads() -> None:
    """Passes have no more threads than the container has cores' time for."""
    if has_extension and (quota := cpu_quota()) is not None:
        from pyargs import _C

        _C.limit_threads(max(1, math.ceil(quota)))


limit_threads()

_stacks: WeakKeyDictionary[nn.Module, tuple] = WeakKeyDictionary()
"""By decoder: the state of it and its output layer, their stack, and by adapter its state and its stack on the same ones."""


def stack_as_held(decoder: nn.Module) -> Stack:
    """`stack_of` a decoder; of a `lora.twin` on weights in fewer bits their stack, with the twin's LoRA as its delta."""
    base = held_base(decoder)
    return stack_of(decoder) if base is None or not lora.active(decoder) else stack_of(base, decoder)


def stack_of(model: nn.Module, adapter: nn.Module | None = None) -> Stack:
    """`pack(model, adapter)`, kept as long as the decoder lives and its modules and numbers stay (each call reads all);
    adapters share the packed weights.

    A stack with an output layer is also given to callers that need none.
    """
    decoder, head = parts_of(model)
    table = decoder.get_input_embeddings().weight  # it and the rotary embedding are what a stack goes on to read
    asked = (
        (
            held(decoder),
            structure(decoder),
            contents(decoder.parameters()),
            table.data_ptr(),
            id(getattr(decoder, "rotary_emb", None)),
        ),
        None if head is None else (structure(head), contents(p for p in head.parameters() if p is not table)),
    )
    kept, stack, twins = _stacks.get(decoder, (asked, None, None))
    if stack is None or any(one is not None and one != other for one, other in zip(asked, kept, strict=True)):
        _stacks.pop(decoder, None)
        stack = twins = None  # before the next one takes its memory
        stack, twins = pack(model), WeakKeyDictionary()
        _stacks[decoder] = asked, stack, twins
    if adapter is None:
        return stack
    own = [p for name, p in adapter.named_parameters() if ".lora_" in name]  # the others are the decoder's
    state = structure(adapter), contents(own)
    kept, twin = twins.get(adapter, (None, None))
    if kept != state:
        twin = with_delta(stack, decoder, adapter)
        twins[adapter] = state, twin
    return twin
