"""branch_attention against scaled_dot_product_attention with a mask over all places, side by side.

    python benchmarks/bench_branch_attention.py [--json FILE] [--quick] [--threads N]

Heads of Qwen2.5-0.5B (14 of queries on 2 of keys, 64 elements), bfloat16. The mask is given, its making not counted; query
heads of a group stand side by side, so that no key is copied for each. Without a GPU ours is the slow reference, and the
numbers say nothing.
"""

from __future__ import annotations

import torch
from timing import against_torch, interleaved, main
from torch import Tensor
from torch.nn import functional as F

from pyargs.ops import branch_attention

COLUMNS = ["prefix", "places", "B", "k", "ours us", "torch us", "ratio", "GB/s", "of stream"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def measure(quick: bool, rate: float) -> list[dict]:
    rows = []
    for prefix, places in [(20, 64)] if quick else [(100, 256), (300, 512), (2000, 2048)]:
        for batch in (2,) if quick else (1, 8):
            for k in (10,) if quick else (1, 10):
                given = inputs(14, 2, 64, batch=batch, k=k, prefix=prefix, places=places, device=DEVICE)
                functions = {"ours": lambda given=given: ours(*given), "torch": lambda given=given: masked(*given)}
                seconds = interleaved(functions, repeats=3 if quick else 20)
                read = torch.stack([states[:, :, : prefix + k] for states in given[1:3]])
                shape = {"prefix": prefix, "places": places, "B": batch, "k": k}
                rows.append(shape | against_torch(seconds, read, rate))
    return rows


def inputs(
    heads: int, kept: int, dim: int, *, batch: int, k: int, prefix: int, places: int, device: str
) -> tuple[Tensor, ...]:
    """Query, keys, values, lengths, and the mask of a captured pass that is added to the scores."""
    random = lambda *shape: torch.randn(*shape, device=device).to(torch.bfloat16)  # noqa: E731
    place, own = torch.arange(places, device=device), prefix + torch.arange(k, device=device)
    seen = ((place < prefix) | (place == own.unsqueeze(1))).repeat(heads // kept, 1)
    mask = torch.zeros(seen.shape, dtype=torch.bfloat16, device=device).masked_fill_(~seen, -torch.inf)
    states = [random(batch, kept, places, dim) for _ in range(2)]
    return (
        random(batch, heads, k, dim),
        *states,
        torch.full((batch,), prefix, device=device),
        mask.expand(batch, 1, *mask.shape),
    )


def ours(query: Tensor, key: Tensor, value: Tensor, length: Tensor, mask: Tensor) -> Tensor:
    return branch_attention(query, key, value, length)


def masked(query: Tensor, key: Tensor, value: Tensor, length: Tensor, mask: Tensor) -> Tensor:
    rows, heads, k, dim = query.shape
    out = F.scaled_dot_product_attention(query.reshape(rows, key.shape[1], -1, dim), key, value, attn_mask=mask)
    return out.view(rows, heads, k, dim).transpose(1, 2).contiguous()


def test_branch_attention(benchmark):
    benchmark(ours, *inputs(14, 2, 64, batch=2, k=10, prefix=100, places=128, device=DEVICE))


if __name__ == "__main__":
    main(__doc__, measure, COLUMNS)
