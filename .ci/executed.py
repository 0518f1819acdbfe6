"""Runs the machine code of the top-k kernel for sm_90 on the host (machine.py), compares with the reference, and counts the
instructions that warps execute in each phase of a row. Fails where a result is wrong or a count beyond its limit.

    python .ci/executed.py          says so and stops where there is no nvcc or no nvdisasm

What the emulation of tests/emulated.py leaves out is in this code: the kernel's own instructions for pairs of 16 bits, for
carries and for tickets. A count is no time: it says nothing of what an instruction waits for.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import machine
import numpy as np
import torch
from kernels import CUDA, DISASSEMBLED, nvdisasm
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from pyargs.ops import topk_logprobs_reference  # noqa: E402

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CHUNK, THREADS, KEPT = 8192, 256, 128
VOCAB = 128_256  # of the row that is counted, bfloat16
# Instructions of a row by k, at most: a tenth more than with nvcc 13.0.
LIMIT = {10: 59_300, 64: 68_400}
# What a function belongs to: of those that an instruction stands in, the outermost that is named here.
PHASES = {
    "TopkElements": "load",
    "largest": "largest of a thread",
    "topk_key": "largest of a thread",
    "bound_by_first_warp": "bound",
    "sums_of_warps": "exponentials and their sum",
    "leave_sum": "exponentials and their sum",
    "keep_survivors": "survivors",
    "keep_exactly": "too many survivors",
    "is_last": "ticket",
    "finish_row": "the row",
}
FUNCTION = re.compile(r"^\s*(?:static )?(?:__device__|PYARGS_HD) .*?(\w+)\(")


@cache
def functions(path: str) -> list[str]:
    """Of each line, counted from 1, the function that it stands in."""
    owners, name = [""], ""
    for line in Path(path).read_text().splitlines():
        name = match[1] if (match := FUNCTION.match(line)) else "" if line.startswith("template") else name
        owners.append(name)
    return owners


def phase(frames: tuple[tuple[str, int], ...]) -> str:
    within = [functions(path)[line] for path, line in reversed(frames) if path.startswith(str(CUDA.parent))]
    return next((PHASES[name] for name in within if name in PHASES), "the rest")


def disassembled() -> str:
    with tempfile.TemporaryDirectory() as folder:
        code, cubin = f"arch=compute_{DISASSEMBLED},code=sm_{DISASSEMBLED}", f"{folder}/x"
        command = ["nvcc", "-std=c++17", "-O3", "-lineinfo", "-gencode", code, "-cubin", "-o", cubin]
        subprocess.run([*command, str(CUDA / "topk_logprobs.cu")], check=True)
        return subprocess.run([nvdisasm(), "-c", "-gi", cubin], capture_output=True, text=True, check=True).stdout


def run(code: machine.Code, logits: Tensor, k: int) -> Counter[int]:
    """Runs the kernel on rows where they lie; raises where a result is not the reference's or a ticket not 0."""
    batch, vocab = logits.shape
    chunks, memory = -(-vocab // CHUNK), machine.Memory()
    parts = batch * chunks
    dense = torch.empty(0, dtype=logits.dtype).set_(logits.untyped_storage())
    rows = memory.add(dense.view(torch.int32 if logits.dtype == torch.float32 else torch.int16).numpy())
    rows += logits.storage_offset() * logits.element_size()
    logprobs, ids, sums = np.empty((batch, k), np.float32), np.empty((batch, k), np.int64), np.empty(batch, np.float32)
    tickets = np.zeros(batch, np.uint32)
    workspace = [np.full(parts * KEPT, 0xDD, np.uint64), np.zeros(parts, np.float32), np.zeros(parts, np.float32), tickets]
    given = [memory.add(array) for array in (logprobs, ids, sums, *workspace)]
    parameters = struct.pack("<QqqIi7Q", rows, vocab, logits.stride(0), chunks, k, *given)
    executed = machine.launch(code, memory, parameters, parts, THREADS)
    expected = topk_logprobs_reference(logits, k)
    assert np.array_equal(ids, expected[1].numpy()), "other ids than the reference"
    for one, other in ((logprobs, expected[0]), (sums, expected[2])):
        np.testing.assert_allclose(one, other.numpy(), atol=5e-5, rtol=0)
    assert not tickets.any(), "a ticket is not 0 at the end"
    return executed


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 5


def cases(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, int]]:
    """Every way through the kernel."""
    yield "two chunks", normal(1, 9000).to(dtype), 10
    yield "unaligned", normal(2, 601).to(dtype)[:, 1:], 64
    yield "ties, more than are kept", (normal(1, 8300) / 5).round().to(dtype), 5
    yield "one value", torch.full((1, 600), -1e30 if dtype != torch.float16 else -6e4, dtype=dtype), 3
    special = torch.full((4, 640), -torch.inf, dtype=dtype)
    special[0, [4, 9, 131]] = torch.nan  # in either half of a register
    special[0, [5, 8]] = torch.inf
    special[1, [3, 8, 14, 15]] = torch.tensor([-0.0, 0.0, -0.0, 0.0], dtype=dtype)
    special[2, ::7] = torch.inf
    yield "NaN, both zeros and infinities", special, 6


def main() -> int:
    if shutil.which("nvcc") is None or nvdisasm() is None:
        print("no nvcc or no nvdisasm: no machine code run")
        return 0
    text, failed = disassembled(), []
    for dtype, number in DTYPES.items():
        code = machine.read(text, f"topk_logprobs_kernel.*DtypeE{number}E")
        for name, logits, k in cases(dtype):
            try:
                run(code, logits, k)
            except (AssertionError, RuntimeError) as error:
                failed.append(f"{name}, {dtype}: {error}")
    code, counts = machine.read(text, "topk_logprobs_kernel.*DtypeE1E"), {}
    for k in LIMIT:
        counts[k] = Counter()
        for place, count in run(code, normal(1, VOCAB).bfloat16(), k).items():
            counts[k][phase(code.instructions[place].frames)] += count
    print(f"{f'instructions of a row of {VOCAB:,}, bfloat16':<48}" + "".join(f"{f'k = {k}':>10}" for k in LIMIT))
    for name in (*dict.fromkeys(PHASES.values()), "the rest"):
        print(f"{name:<48}" + "".join(f"{counts[k][name]:>10,}" for k in LIMIT))
    print(f"{'in all':<48}" + "".join(f"{counts[k].total():>10,}" for k in LIMIT))
    failed += [f"k = {k}: more than {most} instructions" for k, most in LIMIT.items() if counts[k].total() > most]
    print("\n".join(["", "FAILED:", *failed]) if failed else "the machine code agrees with the reference, within its limits")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
