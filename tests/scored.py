"""Inputs of the ops that score candidates, and what the reference makes of them."""

from __future__ import annotations

import torch

from pyargs.ops import score_select, score_select_reference
from pyargs.ops.choice import split_temperature
from pyargs.ops.topk_logprobs import topk_logprobs_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def grid(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Small multiples of 1/4: their products and sums are exact in float32, so that any order of summation agrees."""
    return (torch.randint(-8, 9, shape, generator=generator) / 4).to(dtype)


def problem(batch=3, k=4, hidden=8, users=5, seed=0, dtype=torch.float32, bias=False, shared_weight=False, stop=()) -> dict:
    g = torch.Generator().manual_seed(seed)
    args = {
        "features": grid((batch, k, hidden), g, dtype),
        "weight": grid((1 if shared_weight else users, hidden), g, dtype),
        "user": torch.randint(0, users, (batch,), generator=g),
        "reward_weight": grid((batch,), g),
        "logprobs": grid((batch, k), g).sort(-1, descending=True).values,
        "ids": torch.stack([torch.randperm(80, generator=g)[:k] for _ in range(batch)]) if batch else torch.empty(0, k).long(),
        "finished": torch.rand(batch, generator=g) < 0.2,
    }
    if bias:
        args["bias"] = grid((users, hidden), g, dtype)
    if stop:
        args["stop"] = torch.tensor(stop)
    return args


def random_logits(batch: int, vocab: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return (torch.randn(batch, vocab, generator=torch.Generator().manual_seed(seed)) * 5).to(dtype)


def decided_by_rounding(args: dict) -> torch.Tensor:
    """Rows [B] in which another order of the sums may choose another slot: scores, or cumulated probabilities, as good as
    equal, although the logits are not. Equal logits have equal scores in any order, and must go to the lower slot."""
    logits, rewards = args["logits"].double(), args["reward_logits"].double()
    _, ids, _ = topk_logprobs_reference(args["logits"], args["k"])
    weight = args["reward_weight"].double().unsqueeze(1)
    values = torch.stack([logits.gather(1, ids), torch.where(weight == 0, 0.0, rewards.gather(1, ids))], -1)
    weighted = torch.where(weight == 0, 0.0, weight * (values[..., 1] - rewards.logsumexp(1, keepdim=True)))
    score = values[..., 0] - logits.logsumexp(1, keepdim=True) + weighted
    if "count" in args:
        score = score.where(torch.arange(args["k"]) < args["count"].unsqueeze(1), -torch.inf)
    best = score.argmax(1, keepdim=True)
    close = (score.gather(1, best) - score).abs() < 1e-4
    same = (values == values.gather(1, best.unsqueeze(-1).expand(-1, 1, 2))).all(-1)
    decided = (close & ~same).any(1)
    if "uniform" not in args:
        return decided
    temperature = torch.as_tensor(args["temperature"]).double().view(-1, 1)
    cumulated = (score / temperature).softmax(1).cumsum(1)
    by_chance = ((cumulated - args["uniform"].double().unsqueeze(1)).abs() < 1e-4).any(1)
    return torch.where(temperature.squeeze(1) == 0, decided, by_chance)


def agree(args: dict, atol: float = 2e-5, op=score_select) -> tuple[torch.Tensor, ...]:
    got, expected = op(**args), score_select_reference(**args)
    assert [t.dtype for t in got] == [torch.int64, torch.int64, torch.float32, torch.bool]
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    torch.testing.assert_close(got[2], expected[2], atol=atol, rtol=1e-5, equal_nan=True)
    assert torch.equal(got[3], expected[3])
    return got


def positional(args: dict) -> tuple:
    names = ("features", "weight", "user", "reward_weight", "logprobs", "ids", "finished", "bias")
    number, each = split_temperature(args.get("temperature"))
    choice = args.get("stop"), args.get("stop_reward"), 0, number, args.get("uniform"), args.get("count"), each
    return (*map(args.get, names), 1, args.get("scale", 1.0), *choice, args.get("bank"))
