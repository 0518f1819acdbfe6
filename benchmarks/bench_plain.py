"""Greedy answers of the policy by itself, whole, prompts included: the CPU stack against `generate` of transformers.

    python benchmarks/bench_plain.py [--json FILE] [--quick] [--threads N]

SmolLM2-135M; a tiny random model with --quick.

Eight prompts of random ids, of which the first `shared` are the same in all, as one user's demonstrations are.
Ours is an engine, made anew at each call, so that no prompt is known before. `same` is the share of the answers' tokens before
the first that differs.
"""

from __future__ import annotations

import torch
from timing import interleaved, main

from pyargs.decode.engine import Engine
from pyargs.lm.loading import load_lm

COLUMNS = ["dtype", "prompts", "tokens", "shared", "new", "ours ms", "HF ms", "ratio", "same"]


def measure(quick: bool, rate: float) -> list[dict]:
    # Length, of that shared, new tokens, repeats: the last takes `generate` minutes.
    sizes = [(64, 0, 4, 1)] if quick else [(64, 0, 32, 3), (256, 0, 32, 3), (1536, 1280, 32, 1)]
    rows = []
    for dtype in ("float32",) if quick else ("float32", "bfloat16"):
        lm, _ = load_lm("tiny-random" if quick else "smollm2-135m", device="cpu", dtype=dtype)
        lm.generation_config.eos_token_id = None  # so that both write all tokens
        rows += [compare(lm, dtype, *size) for size in sizes]
    return rows


def compare(lm, dtype: str, length: int, shared: int, new: int, repeats: int) -> dict:
    ids = torch.randint(3, min(4000, lm.config.vocab_size), (8, length), generator=torch.Generator().manual_seed(0))
    ids[:, :shared] = ids[0, :shared]
    prompts = ids.tolist()

    answers: dict[str, torch.Tensor] = {}

    def ours() -> None:
        engine = Engine(lm, backend="cpu", max_rows=len(prompts))
        answers["ours"] = torch.tensor([answer.tokens for answer in engine.generate(prompts, max_new_tokens=new)])

    def theirs() -> None:
        written = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0)
        answers["HF"] = written[:, length:]

    seconds = interleaved({"ours": ours, "HF": theirs}, repeats=repeats, warmup=0)  # it calls each once before it counts
    same = (answers["ours"] == answers["HF"]).cumprod(1).double().mean().item()
    return {
        "dtype": dtype,
        "prompts": len(prompts),
        "tokens": length,
        "shared": shared,
        "new": new,
        **{f"{name} ms": round(1e3 * s, 1) for name, s in seconds.items()},
        "ratio": round(seconds["HF"] / seconds["ours"], 2),
        "same": round(same, 3),
    }


if __name__ == "__main__":
    main(__doc__, measure, COLUMNS)
