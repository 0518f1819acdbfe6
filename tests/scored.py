"""Inputs of the ops that score candidates."""

from __future__ import annotations

import torch

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
