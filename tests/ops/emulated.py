"""The CUDA kernels on the host: csrc/cuda/*.cu compiled by g++ against csrc/emulate, with the signatures of the ops."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import Tensor

CSRC = Path(__file__).parents[2] / "csrc"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

needed = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the kernels for the host")


@cache
def library() -> ctypes.CDLL:
    """Compiled once for each state of the sources, whichever test process comes first."""
    sources = [*sorted(CSRC.glob("cuda/*")), *sorted(CSRC.glob("emulate/*")), CSRC / "common.h"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / "pyargs-emulated"
    folder.mkdir(exist_ok=True)
    target = folder / f"{digest}.so"
    with FileLock(f"{target}.lock"):
        if not target.exists():
            command = [
                "g++",
                "-std=c++20",
                "-O2",
                "-shared",
                "-fPIC",
                "-Wall",
                "-Wextra",
                "-Wno-unknown-pragmas",
                "-Werror",
                "-DPYARGS_EMULATE",
            ]
            command += [
                "-o",
                f"{target}.part",
                "-x",
                "c++",
                *map(str, [*CSRC.glob("cuda/*.cu"), CSRC / "emulate/emulate.cpp"]),
            ]
            subprocess.run(command, check=True)
            Path(f"{target}.part").rename(target)
    found = ctypes.CDLL(str(target))
    for name in ("topk_logprobs",):
        getattr(found, f"pyargs_emulate_{name}").restype = ctypes.c_char_p
    return found


def order(seed: int) -> None:
    """0: threads and blocks in order; else shuffled by this seed."""
    library().pyargs_emulate_order(ctypes.c_uint64(seed))


def call(name: str, *arguments) -> None:
    """Tensors go as pointers, integers as int64, floats as double. Raises RuntimeError with what the launch reports."""
    kinds = {int: ctypes.c_int64, float: ctypes.c_double}
    given = [ctypes.c_void_p(a.data_ptr() if isinstance(a, Tensor) else a) if a is None or isinstance(a, Tensor)
             else kinds[type(a)](a) for a in arguments]  # fmt: skip
    error = getattr(library(), f"pyargs_emulate_{name}")(*given)
    if error:
        raise RuntimeError(error.decode())


def topk_logprobs(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()
    batch, vocab = logits.shape
    out = torch.full((batch, k), torch.nan), torch.full((batch, k), -1, dtype=torch.int64), torch.full((batch,), torch.nan)
    if batch:
        call("topk_logprobs", logits, DTYPES[logits.dtype], batch, vocab, logits.stride(0), k, *out)
    return out
