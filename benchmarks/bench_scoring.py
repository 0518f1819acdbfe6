"""Log-probs of a pair's responses to one prompt, as policy accuracy and tuning need them, against two full forward passes.

    python benchmarks/bench_scoring.py [--json FILE] [--quick] [--threads N]

SmolLM2-135M, float32; a tiny random model with --quick.

two forwards: each whole sequence through the model, log_softmax of all logits, the response's
gathered. ours: `pyargs.scoring.response_logprobs`, which computes the prompt once, keeps logits of 12 positions at most, and
goes through the CPU stack. MiB is the most memory that a call needs beside the weights: the peak of the process, reset
before the call, with an allocator that gives memory back (the script starts itself again with MALLOC_MMAP_THRESHOLD_ set).
"""

from __future__ import annotations

import math
import os
import re
import sys
from pathlib import Path

import torch
from timing import interleaved, main

from pyargs.lm.loading import load_lm
from pyargs.scoring import response_logprobs

COLUMNS = ["prompt", "response", "ours ms", "torch ms", "ratio", "ours MiB", "torch MiB", "memory", "largest difference"]


def measure(quick: bool, rate: float) -> list[dict]:
    lm, _ = load_lm("tiny-random" if quick else "smollm2-135m", device="cpu")
    sizes = [(64, 64)] if quick else [(64, 64), (256, 16), (256, 64), (256, 128)]
    return [compare(lm, prompt, response, 2 if quick else 7) for prompt, response in sizes]


@torch.no_grad()
def two_forwards(lm, prompt: list[int], responses: list[list[int]]) -> list[torch.Tensor]:
    found = []
    for response in responses:
        logprobs = lm(torch.tensor([prompt + response])).logits[0].float().log_softmax(-1)
        found.append(logprobs[len(prompt) - 1 : -1].gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1))
    return found


def peak(fn) -> float:
    """MiB that the process has needed at most during the call, beyond what it had before."""
    status = lambda name: int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # noqa: E731
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = status("VmRSS")
    fn()
    return status("VmHWM") - before


def compare(lm, length: int, size: int, repeats: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(3, min(4000, lm.config.vocab_size), (n,), generator=generator).tolist()  # noqa: E731
    prompt, responses = draw(length), [draw(size), draw(size)]
    ways = {
        "ours": lambda: response_logprobs(lm, [(prompt, responses)])[0],
        "torch": lambda: two_forwards(lm, prompt, responses),
    }
    seconds = interleaved(ways, repeats=repeats, warmup=1)
    memory = {name: peak(fn) for name, fn in ways.items()}
    difference = max((a - b).abs().max().item() for a, b in zip(*(fn() for fn in ways.values()), strict=True))
    return {
        "prompt": length,
        "response": size,
        **{f"{name} ms": round(1e3 * s, 1) for name, s in seconds.items()},
        "ratio": round(seconds["torch"] / seconds["ours"], 2),
        **{f"{name} MiB": round(m, 1) for name, m in memory.items()},
        "memory": round(memory["ours"] / memory["torch"], 3) if memory["torch"] else math.nan,
        "largest difference": difference,
    }


if __name__ == "__main__":
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})
    main(__doc__, measure, COLUMNS)
