"""The CUDA kernels on the host: csrc/kernels/cuda/*.cu compiled by g++ against emulate/, with the signatures of the ops."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from pyargs.ops.row_state import WRITTEN

CSRC = Path(os.environ.get("PYARGS_EMULATED_SOURCES") or Path(__file__).parents[1] / "csrc")
EMULATE = Path(__file__).parent / "ops/emulate"
# What runs the threads, and flags. `.ci/cuda` chooses another than the first.
BUILDS = {
    "fibers": ("fibers.cpp", ["-O2"]),
    "address": ("fibers.cpp", ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]),
    "thread": ("threads.cpp", ["-O1", "-g1", "-fsanitize=thread"]),
}
BUILD = os.environ.get("PYARGS_EMULATED") or "fibers"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

needed = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the kernels for the host")


@cache
def library() -> ctypes.CDLL:
    """Compiled once for each state of the sources, whichever test process comes first."""
    scheduler, flags = BUILDS[BUILD]
    sources = [*sorted(CSRC.glob("kernels/cuda/*")), *sorted(EMULATE.glob("*")), *sorted(CSRC.glob("kernels/*.h"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + " ".join(flags).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / "pyargs-emulated"
    folder.mkdir(exist_ok=True)
    target = folder / f"{digest}.so"
    command = ["g++", "-std=c++20", *flags, "-shared", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
    command += ["-I", str(EMULATE), "-I", str(CSRC), "-o", f"{target}.part", "-x", "c++"]
    command += map(str, [*CSRC.glob("kernels/cuda/*.cu"), EMULATE / "emulate.cpp", EMULATE / scheduler])
    with FileLock(f"{target}.lock"):
        if not target.exists():
            # A sanitizer that this process was started with is none of the compiler's.
            subprocess.run(command, check=True, env=os.environ | {"LD_PRELOAD": ""})
            Path(f"{target}.part").rename(target)
    found = ctypes.CDLL(str(target))
    for name in (
        *("topk_logprobs", "score_select", "score_step", "tokenwise_select", "tokenwise_step"),
        *("user_mlp", "commit", "branch_attention"),
    ):
        getattr(found, f"pyargs_emulate_{name}").restype = ctypes.c_char_p
    return found


def order(seed: int) -> None:
    """0: threads and blocks in order; else shuffled by this seed."""
    library().pyargs_emulate_order(ctypes.c_uint64(seed))


@contextmanager
def stream(number: int = 0, recording: int = 0, device: int = 0, memory: bool = True) -> Iterator[None]:
    """Calls within are queued on the stream of this number, on a device that has memory. recording: of which they become a
    part, by number; 0 is none."""
    choose = library().pyargs_emulate_stream
    try:
        choose(ctypes.c_uint64(number), ctypes.c_uint64(recording), device, memory)
        yield
    finally:
        choose(ctypes.c_uint64(0), ctypes.c_uint64(0), 0, True)


def destroy(recording: int) -> None:
    """The graphs that were made of a recording are gone."""
    library().pyargs_emulate_destroy(ctypes.c_uint64(recording))


def tickets(rows: int) -> int | None:
    """The address of tickets for a kernel that is queued now, of 32 bits each, if the device has any left."""
    give = library().pyargs_emulate_tickets
    give.restype = ctypes.c_void_p
    return give(ctypes.c_int64(rows))


def call(name: str, *arguments) -> None:
    """Tensors go as pointers, integers as int64, floats as double. Raises RuntimeError with what the launch reports."""
    kinds = {int: ctypes.c_int64, float: ctypes.c_double}
    given = [
        ctypes.c_void_p(a.data_ptr() if isinstance(a, Tensor) else a)
        if a is None or isinstance(a, Tensor)
        else kinds[type(a)](a)
        for a in arguments
    ]
    error = getattr(library(), f"pyargs_emulate_{name}")(*given)
    if error:
        raise RuntimeError(error.decode())


def dense(tensor: Tensor) -> Tensor:
    """What the op's checks do: the last dimension side by side, the others as they are."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def choice(stop, temperature, uniform, count) -> tuple[Tensor | None, Tensor | None, tuple, tuple]:
    """What csrc/ops/choice.h makes of the arguments of the choice: uniform, count, (stop, number, stride), temperatures."""
    stop, uniform, count = contiguous(stop, uniform, count)
    number = 0 if stop is None else stop.shape[-1]
    stops = stop, number, number if stop is not None and stop.dim() == 2 else 0
    row_temperature = temperature.contiguous() if isinstance(temperature, Tensor) else None
    return uniform, count, stops, (row_temperature, 0.0 if row_temperature is not None else float(temperature or 0.0))


def topk_logprobs(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    logits = dense(logits)
    batch, vocab = logits.shape
    out = torch.full((batch, k), torch.nan), torch.full((batch, k), -1, dtype=torch.int64), torch.full((batch,), torch.nan)
    if batch:
        call("topk_logprobs", logits, DTYPES[logits.dtype], batch, vocab, logits.stride(0), k, *out)
    return out


def score_select(
    features,
    weight,
    user,
    reward_weight,
    logprobs,
    ids,
    finished,
    *,
    bias=None,
    activation="identity",
    scale=1.0,
    stop=None,
    stop_reward=None,
    pad_id=0,
    temperature=None,
    uniform=None,
    count=None,
    bank=None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from pyargs.ops.score_select import ACTIVATIONS

    features, weight = dense(features), dense(weight)
    bias = None if bias is None else dense(bias)
    batch, k, hidden = features.shape
    user, ids, reward_weight, logprobs, stop_reward = contiguous(user, ids, reward_weight, logprobs, stop_reward)
    uniform, count, stops, temperatures = choice(stop, temperature, uniform, count)
    token, slot = torch.full((2, batch), -7, dtype=torch.int64)
    reward, finished_out = torch.full((batch, k), torch.nan), torch.zeros(batch, dtype=torch.bool)
    if batch:
        call(
            "score_select", features, weight, bias, DTYPES[features.dtype], DTYPES[weight.dtype],
            0 if bias is None else DTYPES[bias.dtype], features.stride(0), features.stride(1), weight.stride(0),
            0 if bias is None else bias.stride(0), batch, k, hidden, len(weight), 1 if bias is None else len(bias), user, ids,
            *stops, reward_weight, logprobs, stop_reward, uniform, count, *temperatures, finished.contiguous(), pad_id,
            list(ACTIVATIONS).index(activation), float(scale), token, slot, reward, finished_out,
            *of_bank(bank),
        )  # fmt: skip
    return token, slot, reward, finished_out


def tokenwise_select(
    logits,
    reward_logits,
    reward_weight,
    finished,
    k,
    *,
    stop=None,
    pad_id=0,
    temperature=None,
    uniform=None,
    count=None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits, reward_logits = dense(logits), dense(reward_logits)
    batch, vocab = logits.shape
    uniform, count, stops, temperatures = choice(stop, temperature, uniform, count)
    token, slot = torch.full((2, batch), -7, dtype=torch.int64)
    reward, finished_out = torch.full((batch, k), torch.nan), torch.zeros(batch, dtype=torch.bool)
    if batch:
        call(
            "tokenwise_select", logits, reward_logits, DTYPES[logits.dtype], DTYPES[reward_logits.dtype], logits.stride(0),
            reward_logits.stride(0), batch, vocab, k, reward_weight.contiguous(), finished.contiguous(), *stops, pad_id,
            uniform, count, *temperatures, token, slot, reward, finished_out,
        )  # fmt: skip
    return token, slot, reward, finished_out


def of_state(state, pad_id: int) -> tuple:
    """The state as csrc/ops/choice.h hands it on: its tensors, stops and their stride, noises, and the padding."""
    stop, noise = state.stop.contiguous(), state.noise
    number = stop.shape[-1]
    read = {name: contiguous(value)[0] for name, value in state._asdict().items() if name not in WRITTEN}
    given = state._replace(**read | {"stop": stop})
    return *given, number, number if stop.dim() == 2 else 0, 0 if noise is None else noise.shape[1], pad_id


def of_bank(bank: Tensor | None) -> tuple:
    if bank is None:
        return None, 0, 0, 0, 0, 0
    bank = dense(bank)
    return bank, DTYPES[bank.dtype], bank.stride(0), bank.stride(1), bank.shape[1], bank.shape[0]


def score_step(
    features, weight, user, logprobs, ids, state, *, bias=None, activation="identity", scale=1.0, pad_id=0, bank=None
) -> None:
    from pyargs.ops.score_select import ACTIVATIONS

    features, weight, bias = dense(features), dense(weight), None if bias is None else dense(bias)
    (user,), (batch, k, hidden) = contiguous(user), features.shape
    logprobs, ids = (dense(one) for one in (logprobs, ids))
    if batch:
        call(
            "score_step", features, weight, bias, DTYPES[features.dtype], DTYPES[weight.dtype],
            0 if bias is None else DTYPES[bias.dtype], features.stride(0), features.stride(1), weight.stride(0),
            0 if bias is None else bias.stride(0), batch, k, hidden, len(weight), 1 if bias is None else len(bias), user, ids,
            logprobs, ids.stride(0), logprobs.stride(0), list(ACTIVATIONS).index(activation), float(scale),
            *of_state(state, pad_id), *of_bank(bank),
        )  # fmt: skip


def tokenwise_step(logits, reward_logits, k, state, *, pad_id=0) -> None:
    logits, reward_logits = dense(logits), dense(reward_logits)
    if len(logits):
        call(
            "tokenwise_step", logits, reward_logits, DTYPES[logits.dtype], DTYPES[reward_logits.dtype], logits.stride(0),
            reward_logits.stride(0), *logits.shape, k, *of_state(state, pad_id),
        )  # fmt: skip


def user_mlp(hidden: Tensor, bank: Tensor, user: Tensor) -> Tensor:
    hidden, bank, user = dense(hidden), dense(bank), user.contiguous()
    out = torch.full((*hidden.shape[:2], bank.shape[1]), -7.0)
    if len(hidden):
        call(
            "user_mlp", hidden, bank, DTYPES[hidden.dtype], DTYPES[bank.dtype], hidden.stride(0), hidden.stride(1),
            bank.stride(0), bank.stride(1), *hidden.shape, bank.shape[1], bank.shape[0], user, out,
        )  # fmt: skip
    return out


def commit(states: list[Tensor], slot: Tensor, length: Tensor) -> None:
    batch, heads, capacity, dim = states[0].shape
    size = states[0].element_size()
    strides = [size * stride for stride in states[0].stride()[:3]]
    slot, length = slot.contiguous(), length.contiguous()
    if batch * heads:
        addresses = torch.tensor([tensor.data_ptr() for tensor in states])
        call("commit", addresses, len(states), batch, heads, capacity, *strides, dim * size, slot, length)


def branch_attention(query: Tensor, key: Tensor, value: Tensor, length: Tensor, scale: float | None = None) -> Tensor:
    query, (batch, heads, places, dim) = aligned(query), key.shape
    out = torch.full((batch, query.shape[2], query.shape[1], dim), -7.0, dtype=query.dtype)
    if batch:
        strides = torch.tensor([tensor.stride(d) for tensor in (query, key, value) for d in range(3)])
        call(
            "branch_attention", query, key, value, DTYPES[query.dtype], strides, batch, heads, query.shape[1] // heads,
            query.shape[2], places, dim, length.contiguous(), dim**-0.5 if scale is None else float(scale), out,
        )  # fmt: skip
    return out


def aligned(tensor: Tensor) -> Tensor:
    """As it is where its last dimension is dense and all rows start at multiples of 16 bytes; else a dense copy."""
    size = tensor.element_size()
    starts = [tensor.data_ptr(), *(size * tensor.stride(d) for d in range(3) if tensor.shape[d] > 1)]
    return tensor if tensor.stride(-1) == 1 and all(start % 16 == 0 for start in starts) else tensor.contiguous().clone()
