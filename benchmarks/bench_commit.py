"""commit against indexing each layer's keys and values, side by side.

    python benchmarks/bench_commit.py [--json FILE] [--quick] [--threads N]

The keys and values of 30 layers with 3 heads of 64 (SmolLM2-135M), a prefix of 256 tokens and k = 10 branches behind it.
"""

from __future__ import annotations

import torch
from timing import against_torch, interleaved, main
from torch import Tensor

from pyargs.ops import commit

COLUMNS = ["layers", "B", "dtype", "ours us", "torch us", "ratio", "GB/s", "of stream"]
PREFIX, BRANCHES = 256, 10


def measure(quick: bool, rate: float) -> list[dict]:
    rows = []
    for batch in (8,) if quick else (1, 8, 64):
        for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
            rows.append(compare(batch, dtype, rate, repeats=5 if quick else 20))
    return rows


def inputs(batch: int, dtype: torch.dtype, layers: int = 30) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = [torch.zeros(batch, 3, PREFIX + BRANCHES, 64, dtype=dtype) for _ in range(2 * layers)]
    return states, torch.randint(1, BRANCHES, (batch,), generator=generator), torch.full((batch,), PREFIX)


def torch_commit(states: list[Tensor], slot: Tensor, rows: Tensor) -> None:
    for tensor in states:
        tensor[:, :, PREFIX] = tensor[rows, :, PREFIX + slot]


def compare(batch: int, dtype: torch.dtype, rate: float, repeats: int) -> dict:
    states, slot, length = inputs(batch, dtype)
    rows = torch.arange(batch)
    functions = {"ours": lambda: commit(states, slot, length), "torch": lambda: torch_commit(states, slot, rows)}
    moved = torch.empty(2, len(states), batch, 3, 64, dtype=dtype)  # read and written
    shape = {"layers": len(states) // 2, "B": batch, "dtype": str(dtype).removeprefix("torch.")}
    return shape | against_torch(interleaved(functions, repeats), moved, rate)


def test_commit(benchmark):
    benchmark(commit, *inputs(8, torch.float32))


if __name__ == "__main__":
    main(__doc__, measure, COLUMNS)
