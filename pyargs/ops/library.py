"""Brings the ops into `torch.ops.pyargs`: the native kernels where the extension is built, the references elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from itertools import compress

import torch
from torch.autograd.graph import increment_version

from pyargs.errors import PyargsError
from pyargs.ops.extension import NAMESPACE, has_extension

native: set[str] = set()
"""Names of the ops with a native CPU kernel in this process."""


def define(name: str, default: Callable, fake: Callable, mutates: tuple[str, ...] = ()) -> tuple[Callable, Callable]:
    """The op `pyargs::name`; its schema is in csrc/ops/name.cpp and in the annotations of `default`.

    Returns the op, for compiled code, and the same without the Python frame around it, which takes a tenth of a small call.

    `default` serves devices without a native kernel; `fake` gives shapes and dtypes. Neither has keyword-only arguments:
    looking keywords up costs more than a small kernel. `mutates` names the arguments that it changes: tensors, lists of them,
    or None.
    """
    qualified = f"{NAMESPACE}::{name}"
    if not has_extension:
        torch.library.define(qualified, torch.library.infer_schema(default, mutates_args=mutates))
    else:
        _check_built_from_these(qualified, torch.library.infer_schema(default, mutates_args=mutates))
        if torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CPU"):
            native.add(name)
    torch.library.impl(qualified, "default", default)
    torch.library.register_fake(qualified, fake)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    if mutates:
        _written_in_place(op, [argument.name in mutates for argument in op._schema.arguments])
    return op, op._op


def _check_built_from_these(qualified: str, schema: str) -> None:
    """Raises PyargsError where the extension has no such op, or one with other arguments."""
    wanted = torch._C.parse_schema(qualified + schema)
    try:
        built = torch._C._get_schema(qualified, "")
    except RuntimeError:
        built = None
    if built is None or _described(built) != _described(wanted):
        has = "it has no" if built is None else "it has another"
        raise PyargsError(
            f"pyargs._C was built from other sources than these Python files: {has} op {qualified}. Build it again: "
            "pip install . (or pip install -e .), or set PYARGS_NO_EXT=1 to do without"
        )


def _described(schema) -> list:
    arguments = [(one.name, str(one.type), one.has_default_value(), one.is_write) for one in schema.arguments]
    return [*arguments, *(str(one.type) for one in schema.returns)]


_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # it must live as long as what it registered


def _written_in_place(op, mutated: list[bool]) -> None:
    """Before each call: what torch does where its own in-place operators change tensors. No operator does it by itself."""

    def kernel(keyset, *args):
        for given in compress(args, mutated):
            tensors = given if isinstance(given, list) else [] if given is None else [given]
            if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
                raise RuntimeError(f"{op} changes tensors that require grad, and is not differentiable: use torch.no_grad()")
            if not torch.is_inference_mode_enabled() and any(tensor.is_inference() for tensor in tensors):
                raise RuntimeError(f"{op} changes inference tensors: call it in torch.inference_mode(), or clone them")
            increment_version(tensors)
        return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    _library.impl(op._schema.name.removeprefix(f"{NAMESPACE}::"), kernel, "ADInplaceOrView", with_keyset=True)


def check_tensors(expected: dict[str, tuple], optional: tuple[str, ...] = ()) -> None:
    """Raises the error that names the fix unless all fit and are on one device.

    expected: name -> (tensor, dtypes, shape), where None in a shape fits any size; those in `optional` may be None.
    """
    given = {}
    for name, (tensor, dtypes, shape) in expected.items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name} must be {' or '.join(str(d)[6:] for d in dtypes)}, got {tensor.dtype}")
        fits = tensor.dim() == len(shape) and all(e is None or e == n for n, e in zip(tensor.shape, shape, strict=True))
        if not fits:
            wanted = ", ".join("any" if e is None else str(e) for e in shape)
            raise ValueError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")
        given[name] = tensor
    device_of(**given)


def device_of(**tensors: torch.Tensor | None) -> torch.device:
    """The common device of the given tensors; raises ValueError where they differ."""
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    first, *others = devices
    for name in others:
        if devices[name] != devices[first]:
            raise ValueError(f"{name} is on {devices[name]} but {first} on {devices[first]}: move all arguments to one device")
    return devices[first]
