"""topk_logprobs against torch.log_softmax(logits.float(), -1).topk(k), side by side.

    python benchmarks/bench_topk_logprobs.py [--json FILE] [--quick] [--threads N]

`of stream` is the rate at which the logits are read over the rate at which the machine reads memory; above 1 the logits
were in a cache, where those of a real language model's head also are.
"""

from __future__ import annotations

import torch
from timing import against_torch, interleaved, main

from pyargs.ops import topk_logprobs

COLUMNS = ["V", "B", "k", "dtype", "ours us", "torch us", "ratio", "GB/s", "of stream"]


def measure(quick: bool, rate: float) -> list[dict]:
    rows = []
    for vocab in (49152,) if quick else (49152, 151936):
        for batch in (1, 8) if quick else (1, 8, 64):
            for dtype in (torch.float32, torch.bfloat16):
                for k in (10,) if quick else (10, 40):
                    rows.append(compare(vocab, batch, dtype, k, rate, repeats=5 if quick else 20))
    return rows


def compare(vocab: int, batch: int, dtype: torch.dtype, k: int, rate: float, repeats: int) -> dict:
    logits = (torch.randn(batch, vocab, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    seconds = interleaved(
        {
            "ours": lambda: topk_logprobs(logits, k),
            "torch": lambda: torch.log_softmax(logits.float(), -1).topk(k),
        },
        repeats,
    )
    shape = {"V": vocab, "B": batch, "k": k, "dtype": str(dtype).removeprefix("torch.")}
    return shape | against_torch(seconds, logits, rate)


def test_topk_logprobs(benchmark):
    logits = torch.randn(8, 49152)
    benchmark(topk_logprobs, logits, 10)


def test_log_softmax_topk(benchmark):
    logits = torch.randn(8, 49152)
    benchmark(lambda: torch.log_softmax(logits, -1).topk(10))


if __name__ == "__main__":
    main(__doc__, measure, COLUMNS)
