"""A few small calls of every op on a GPU, for compute-sanitizer, which is too slow for the tests. Without one: on the CPU.

    compute-sanitizer --tool memcheck python benchmarks/gpu_small.py

Shapes are such that blocks, chunks and vectors are cut short somewhere: rows that start at odd addresses, ties, a row of -inf.
"""

from __future__ import annotations

import torch

from pyargs.ops import (
    RowState,
    branch_attention,
    commit,
    score_select,
    score_step,
    tokenwise_select,
    tokenwise_step,
    topk_logprobs,
    user_mlp,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Its rows end one element before the next one starts, and its first lies at an odd address."""
    wide = torch.randn(*shape[:-1], shape[-1] + 1, device=DEVICE).to(dtype)
    return wide[..., 1:]


def state(sums: bool) -> RowState:
    """Three rows, of which the second has finished, with all that a row may ask for."""
    one = lambda values, dtype=torch.int64: torch.tensor(values, dtype=dtype, device=DEVICE)  # noqa: E731
    more = dict(so_far=one([0.5] * 3, torch.float32), total=one([1.0] * 3, torch.float32)) if sums else {}
    return RowState(
        reward_weight=one([1.0] * 3, torch.float32), finished=one([False, True, False], torch.bool), step=one([0, 1, 2]),
        limit=one([9, 9, 3]), token=one([0] * 3), slot=one([0] * 3), chosen=one([[0.0] * 5] * 3, torch.float64),
        stop=one([[5, -1], [6, 7], [8, 9]]), temperature=one([0.0, 1.0, 0.7], torch.float32),
        noise=one([[0.5, 0.9]] * 3, torch.float32), own_k=one([64, 1, 33]), top_p=one([1.0, 1.0, 0.9], torch.float64),
        min_p=one([0.0, 0.0, 0.1], torch.float64), **more,
    )  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = random(3, 17001, dtype=dtype)
        logits[1] = -torch.inf
        logits[2] = logits[2].round()
        logprobs, ids, _ = topk_logprobs(logits, 64)
        user, finished = torch.tensor([0, 3, 7], device=DEVICE), torch.tensor([False, True, False], device=DEVICE)
        weight, stop = torch.ones(3, device=DEVICE), torch.tensor([5, 6], device=DEVICE)
        own = {
            "stop": torch.tensor([[5, -1], [6, 7], [8, 9]], device=DEVICE),
            "temperature": torch.tensor([0.0, 1.0, 0.7], device=DEVICE),
            "uniform": weight / 2,
            "count": torch.tensor([64, 0, 33], device=DEVICE),
        }
        for hidden in (7, 2100):
            features, bank = random(3, 64, hidden, dtype=dtype), random(5, hidden, dtype=dtype)
            for activation in ("identity", "relu", "gelu", "leaky_relu"):
                score_select(
                    features,
                    bank,
                    user,
                    weight,
                    logprobs,
                    ids,
                    finished,
                    bias=bank,
                    activation=activation,
                    stop_reward=weight,
                    **own,
                )
        for hidden in (7, 2100):
            score_step(
                random(3, 64, hidden, dtype=dtype), random(5, hidden, dtype=dtype), user % 5, logprobs, ids, state(sums=True)
            )
        tokenwise_step(logits, random(3, 17001, dtype=dtype), 64, state(sums=False))
        states, matrices = random(3, 64, 577, dtype=dtype), random(5, 37, 577, dtype=dtype)
        user_mlp(states, matrices, user)
        few = random(5, 37, dtype=dtype)
        score_select(states, few, user, weight, logprobs, ids, finished, bias=few, stop_reward=weight, bank=matrices, **own)
        for choice in ({"stop": stop}, own):
            tokenwise_select(logits, random(3, 17001, dtype=dtype), weight, finished, 64, **choice)
        for dim in (40, 128):
            query, key, value = (
                torch.randn(3, *shape, dim, device=DEVICE).to(dtype) for shape in ((4, 9), (2, 139), (2, 139))
            )
            branch_attention(query, key, value, torch.tensor([130, 7, 0], device=DEVICE))
        commit([torch.randn(3, 2, 9, 33, device=DEVICE).to(dtype)] * 3, user % 3, 2 + user % 4)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print(f"all ops ran on {DEVICE}")


if __name__ == "__main__":
    main()
