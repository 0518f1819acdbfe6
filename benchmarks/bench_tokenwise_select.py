"""tokenwise_select against the same step in PyTorch operators, and against topk_logprobs and score_select in a row.

    python benchmarks/bench_tokenwise_select.py [--json FILE] [--quick] [--threads N]

torch: topk of the policy's logits, both logsumexps, gather, combine, argmax, gather the token. composed: topk_logprobs, gather
and logsumexp of the reward logits in PyTorch, score_select. GB/s and `of stream` count the logits of both models; above 1 they
were in a cache, where those of a real language model's head also are.
"""

from __future__ import annotations

import torch
from timing import against_torch, interleaved, main
from torch import Tensor

from pyargs.ops import score_select, tokenwise_select, topk_logprobs

COLUMNS = ["V", "B", "k", "dtype", "ours us", "composed us", "torch us", "ratio", "GB/s", "of stream"]


def measure(quick: bool, rate: float) -> list[dict]:
    rows = []
    for vocab in (49152,) if quick else (49152, 151936):
        for batch in (1, 8) if quick else (1, 8, 64):
            for dtype in (torch.float32, torch.bfloat16):
                for k in (10,) if quick else (10, 40):
                    rows.append(compare(vocab, batch, dtype, k, rate, repeats=5 if quick else 20))
    return rows


def inputs(vocab: int, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    both = (torch.randn(2 * batch, vocab, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    return both[:batch], both[batch:], torch.ones(batch), torch.zeros(batch, dtype=torch.bool)


def in_torch(logits: Tensor, reward_logits: Tensor, k: int, weight: Tensor):
    logits, reward_logits = logits.float(), reward_logits.float()
    values, ids = logits.topk(k)
    logprobs = values - logits.logsumexp(-1, keepdim=True)
    reward = reward_logits.gather(-1, ids) - reward_logits.logsumexp(-1, keepdim=True)
    slot = (logprobs + weight.unsqueeze(1) * reward).argmax(-1, keepdim=True)
    return ids.gather(-1, slot), slot, reward


def composed(logits: Tensor, reward_logits: Tensor, k: int, weight: Tensor, finished: Tensor, user: Tensor, ones: Tensor):
    logprobs, ids, _ = topk_logprobs(logits, k)
    reward_logits = reward_logits.float()
    reward = reward_logits.gather(-1, ids) - reward_logits.logsumexp(-1, keepdim=True)
    return score_select(reward.unsqueeze(-1), ones, user, weight, logprobs, ids, finished)


def compare(vocab: int, batch: int, dtype: torch.dtype, k: int, rate: float, repeats: int) -> dict:
    logits, reward_logits, weight, finished = inputs(vocab, batch, dtype)
    user, ones = torch.zeros(batch, dtype=torch.int64), torch.ones(1, 1)
    seconds = interleaved(
        {
            "ours": lambda: tokenwise_select(logits, reward_logits, weight, finished, k),
            "composed": lambda: composed(logits, reward_logits, k, weight, finished, user, ones),
            "torch": lambda: in_torch(logits, reward_logits, k, weight),
        },
        repeats,
    )
    shape = {"V": vocab, "B": batch, "k": k, "dtype": str(dtype).removeprefix("torch.")}
    both = logits.new_empty(2 * batch, vocab, device="meta")
    return shape | {"composed us": round(seconds["composed"] * 1e6, 1)} | against_torch(seconds, both, rate)


def test_tokenwise_select(benchmark):
    logits, reward_logits, weight, finished = inputs(49152, 8, torch.float32)
    benchmark(tokenwise_select, logits, reward_logits, weight, finished, 10)


def test_topk_logsumexp_gather(benchmark):
    logits, reward_logits, weight, _ = inputs(49152, 8, torch.float32)
    benchmark(in_torch, logits, reward_logits, 10, weight)


if __name__ == "__main__":
    main(__doc__, measure, COLUMNS)
