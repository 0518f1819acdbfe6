"""score_select against the same step in PyTorch operators, side by side.

    python benchmarks/bench_score_select.py [--json FILE] [--quick] [--threads N]

linear: gather the users' rows, bmm, combine, argmax, gather the token. mlp: the part after the shared matrix product:
gather the users' biases, add, relu, matmul with the last layer, combine, argmax, gather the token. user_mlp: gather the
users' matrices, bmm, and what mlp has, with a last layer of each user's own; states of 576. k = 10.
"""

from __future__ import annotations

import torch
from timing import against_torch, interleaved, main

from pyargs.ops import score_select

COLUMNS = ["family", "H", "B", "dtype", "ours us", "torch us", "ratio", "GB/s", "of stream"]
USERS, DIM = 100, 576


def measure(quick: bool, rate: float) -> list[dict]:
    rows = []
    shapes = [("linear", 576)] + [("mlp", hidden) for hidden in ((64,) if quick else (64, 128, 256, 512))]
    shapes += [("user_mlp", hidden) for hidden in ((64,) if quick else (64, 128))]
    for family, hidden in shapes:
        for batch in (8,) if quick else (1, 8, 64):
            for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
                rows.append(compare(family, hidden, batch, dtype, rate, repeats=5 if quick else 20))
    return rows


def inputs(family: str, hidden: int, batch: int, dtype: torch.dtype, k: int = 10) -> dict:
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    linear, own = family == "linear", family == "user_mlp"
    return {
        "features": random(batch, k, DIM if own else hidden).to(dtype),
        "weight": random(1 if family == "mlp" else USERS, hidden).to(dtype),
        "user": torch.randint(USERS, (batch,), generator=generator),
        "reward_weight": torch.ones(batch),
        "logprobs": random(batch, k).sort(-1, descending=True).values,
        "ids": torch.randint(49152, (batch, k), generator=generator),
        "finished": torch.zeros(batch, dtype=torch.bool),
        "bias": None if linear else random(USERS, hidden).to(dtype),
        "activation": "identity" if linear else "relu",
        "bank": random(USERS, hidden, DIM).to(dtype) if own else None,
    }


def torch_linear(features, weight, user, reward_weight, logprobs, ids):
    reward = torch.bmm(features, weight[user].unsqueeze(-1)).squeeze(-1).float()
    slot = (logprobs + reward_weight[:, None] * reward).argmax(-1, keepdim=True)
    return ids.gather(-1, slot), slot, reward


def torch_mlp(features, weight, user, reward_weight, logprobs, ids, bias):
    reward = (torch.relu(features + bias[user].unsqueeze(1)) @ weight[0]).float()
    slot = (logprobs + reward_weight[:, None] * reward).argmax(-1, keepdim=True)
    return ids.gather(-1, slot), slot, reward


def torch_user_mlp(features, weight, user, reward_weight, logprobs, ids, bias, bank):
    first = torch.relu(torch.bmm(features, bank[user].transpose(1, 2)) + bias[user].unsqueeze(1))
    reward = torch.bmm(first, weight[user].unsqueeze(-1)).squeeze(-1).float()
    slot = (logprobs + reward_weight[:, None] * reward).argmax(-1, keepdim=True)
    return ids.gather(-1, slot), slot, reward


def compare(family: str, hidden: int, batch: int, dtype: torch.dtype, rate: float, repeats: int) -> dict:
    args = inputs(family, hidden, batch, dtype)
    names = "features", "weight", "user", "reward_weight", "logprobs", "ids"
    theirs = {
        "linear": (torch_linear, names),
        "mlp": (torch_mlp, (*names, "bias")),
        "user_mlp": (torch_user_mlp, (*names, "bias", "bank")),
    }
    function, wanted = theirs[family]
    wanted = [args[name] for name in wanted]
    read = args["features"] if args["bank"] is None else args["bank"][args["user"].unique()]
    seconds = interleaved({"ours": lambda: score_select(**args), "torch": lambda: function(*wanted)}, repeats)
    shape = {"family": family, "H": hidden, "B": batch, "dtype": str(dtype).removeprefix("torch.")}
    return shape | against_torch(seconds, read, rate)


def test_score_select_linear(benchmark):
    benchmark(lambda args: score_select(**args), inputs("linear", 576, 8, torch.float32))


def test_score_select_mlp(benchmark):
    benchmark(lambda args: score_select(**args), inputs("mlp", 256, 8, torch.float32))


def test_score_select_user_mlp(benchmark):
    benchmark(lambda args: score_select(**args), inputs("user_mlp", 64, 8, torch.float32))


if __name__ == "__main__":
    main(__doc__, measure, COLUMNS)
