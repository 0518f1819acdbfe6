"""score_select against the same step in PyTorch operators, side by side.

    python benchmarks/bench_score_select.py [--json FILE] [--quick] [--threads N]

linear: gather the users' rows, bmm, combine, argmax, gather the token. mlp: the part after the shared matrix product:
gather the users' biases, add, relu, matmul with the last layer, combine, argmax, gather the token. k = 10.
"""

from __future__ import annotations

import torch
from timing import against_torch, interleaved, main

from pyargs.ops import score_select

COLUMNS = ["family", "H", "B", "dtype", "ours us", "torch us", "ratio", "GB/s", "of stream"]
USERS = 100


def measure(quick: bool, rate: float) -> list[dict]:
    rows = []
    shapes = [("linear", 576)] + [("mlp", hidden) for hidden in ((64,) if quick else (64, 128, 256, 512))]
    for family, hidden in shapes:
        for batch in (8,) if quick else (1, 8, 64):
            for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
                rows.append(compare(family, hidden, batch, dtype, rate, repeats=5 if quick else 20))
    return rows


def inputs(family: str, hidden: int, batch: int, dtype: torch.dtype, k: int = 10) -> dict:
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    linear = family == "linear"
    return {
        "features": random(batch, k, hidden).to(dtype),
        "weight": random(USERS if linear else 1, hidden).to(dtype),
        "user": torch.randint(USERS, (batch,), generator=generator),
        "reward_weight": torch.ones(batch),
        "logprobs": random(batch, k).sort(-1, descending=True).values,
        "ids": torch.randint(49152, (batch, k), generator=generator),
        "finished": torch.zeros(batch, dtype=torch.bool),
        "bias": None if linear else random(USERS, hidden).to(dtype),
        "activation": "identity" if linear else "relu",
    }


def torch_linear(features, weight, user, reward_weight, logprobs, ids):
    reward = torch.bmm(features, weight[user].unsqueeze(-1)).squeeze(-1).float()
    slot = (logprobs + reward_weight[:, None] * reward).argmax(-1, keepdim=True)
    return ids.gather(-1, slot), slot, reward


def torch_mlp(features, weight, user, reward_weight, logprobs, ids, bias):
    reward = (torch.relu(features + bias[user].unsqueeze(1)) @ weight[0]).float()
    slot = (logprobs + reward_weight[:, None] * reward).argmax(-1, keepdim=True)
    return ids.gather(-1, slot), slot, reward


def compare(family: str, hidden: int, batch: int, dtype: torch.dtype, rate: float, repeats: int) -> dict:
    args = inputs(family, hidden, batch, dtype)
    features, weight, user, reward_weight = (args[n] for n in ("features", "weight", "user", "reward_weight"))
    logprobs, ids, finished, bias = (args[n] for n in ("logprobs", "ids", "finished", "bias"))
    ours = {
        "linear": lambda: score_select(features, weight, user, reward_weight, logprobs, ids, finished),
        "mlp": lambda: score_select(
            features, weight, user, reward_weight, logprobs, ids, finished, bias=bias, activation="relu"
        ),
    }
    theirs = {
        "linear": lambda: torch_linear(features, weight, user, reward_weight, logprobs, ids),
        "mlp": lambda: torch_mlp(features, weight, user, reward_weight, logprobs, ids, bias),
    }
    seconds = interleaved({"ours": ours[family], "torch": theirs[family]}, repeats)
    shape = {"family": family, "H": hidden, "B": batch, "dtype": str(dtype).removeprefix("torch.")}
    return shape | against_torch(seconds, features, rate)


def test_score_select_linear(benchmark):
    benchmark(lambda args: score_select(**args), inputs("linear", 576, 8, torch.float32))


def test_score_select_mlp(benchmark):
    benchmark(lambda args: score_select(**args), inputs("mlp", 256, 8, torch.float32))


if __name__ == "__main__":
    main(__doc__, measure, COLUMNS)
