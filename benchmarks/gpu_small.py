"""A few small calls of every op on a GPU, for compute-sanitizer, which is too slow for the tests. Without one: on the CPU.

    compute-sanitizer --tool memcheck python benchmarks/gpu_small.py

Shapes are such that blocks, chunks and vectors are cut short somewhere: rows that start at odd addresses, ties, a row of -inf.
"""

from __future__ import annotations

import torch

from pyargs.ops import commit, score_select, tokenwise_select, topk_logprobs, user_mlp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Its rows end one element before the next one starts, and its first lies at an odd address."""
    wide = torch.randn(*shape[:-1], shape[-1] + 1, device=DEVICE).to(dtype)
    return wide[..., 1:]


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
        user_mlp(random(3, 13, 577, dtype=dtype), random(5, 37, 577, dtype=dtype), user)
        for choice in ({"stop": stop}, own):
            tokenwise_select(logits, random(3, 17001, dtype=dtype), weight, finished, 64, **choice)
        commit([torch.randn(3, 2, 9, 33, device=DEVICE).to(dtype)] * 3, user % 3, 2 + user % 4)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print(f"all ops ran on {DEVICE}")


if __name__ == "__main__":
    main()
