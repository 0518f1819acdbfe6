"""user_mlp against gathering the users' matrices and bmm, side by side.

    python benchmarks/bench_user_mlp.py [--json FILE] [--quick] [--threads N]

k = 10 candidates, 100 users, as many distinct ones in a batch as it has rows. bmm runs in the dtype of its inputs and
rounds its result to it; ours sums and answers in float32. GB/s is the rate at which the matrices are read.
"""

from __future__ import annotations

import torch
from timing import against_torch, interleaved, main

from pyargs.ops import user_mlp

COLUMNS = ["D", "H", "B", "dtype", "ours us", "torch us", "ratio", "GFLOP/s", "GB/s", "of stream"]
USERS = 100


def measure(quick: bool, rate: float) -> list[dict]:
    rows = []
    for dim in (576,) if quick else (576, 896):
        for units in (64,) if quick else (64, 128):
            for batch in (8,) if quick else (1, 8, 64):
                for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
                    rows.append(compare(dim, units, batch, dtype, rate, repeats=5 if quick else 20))
    return rows


def inputs(dim: int, units: int, batch: int, dtype: torch.dtype, k: int = 10) -> dict:
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {
        "hidden": random(batch, k, dim).to(dtype),
        "bank": random(USERS, units, dim).to(dtype),
        "user": torch.randperm(USERS, generator=generator)[:batch],
    }


def torch_user_mlp(hidden, bank, user):
    return torch.bmm(hidden, bank[user].transpose(1, 2))


def compare(dim: int, units: int, batch: int, dtype: torch.dtype, rate: float, repeats: int) -> dict:
    args = inputs(dim, units, batch, dtype)
    hidden, bank, user = args.values()
    functions = {"ours": lambda: user_mlp(hidden, bank, user), "torch": lambda: torch_user_mlp(hidden, bank, user)}
    seconds = interleaved(functions, repeats)
    work = 2 * hidden.shape[1] * batch * units * dim
    shape = {"D": dim, "H": units, "B": batch, "dtype": str(dtype).removeprefix("torch.")}
    return shape | {"GFLOP/s": round(work / seconds["ours"] / 1e9, 1)} | against_torch(seconds, bank[:batch], rate)


def test_user_mlp(benchmark):
    benchmark(lambda args: user_mlp(**args), inputs(576, 64, 8, torch.float32))


def test_user_mlp_bfloat16(benchmark):
    benchmark(lambda args: user_mlp(**args), inputs(576, 64, 8, torch.bfloat16))


if __name__ == "__main__":
    main(__doc__, measure, COLUMNS)
