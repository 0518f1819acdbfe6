"""Time of one decoding step: the engine, our own greedy step, the reference loop, and greedy `generate`, side by side.

    python benchmarks/bench_decode.py [--json FILE] [--plot FILE] [--quick] [--dtype bfloat16] [--threads N]

Policy: SmolLM2-135M. Reward model: LoRA (r=8 on q and v, random) on the same weights and a linear head of rank 8; the
reference loop has it merged into weights of its own (not in bfloat16, where `merge` leaves it as it is). Every row of a
batch is another user; one row takes turns over five prompts and two users. k = 10. The weight is such that rewards really
steer: `top-1` is the share of steps in which the policy's favourite won (a benchmark in which it always wins could skip the
reward model), `missed` the share in which the policy's row of the winner had not been guessed and took a pass of its own.
`greedy` is the policy alone through the same CPU stack. `of stream`: how long the memory takes to deliver the policy's
weights once, over the time of a step; 1 is not the end, since most of the output layer is read in eight bits. Prefill is not
counted: a step is the time between two tokens. All take turns in short runs; ratios are medians of a turn's ratios.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from timing import hardware, hardware_line, options, streaming_rate, table
from torch import Tensor
from tqdm import tqdm
from transformers import StoppingCriteria

import pyargs
from pyargs.decode import reference
from pyargs.decode.backends.cpu import GUESSES
from pyargs.decode.engine import Engine
from pyargs.decode.request import Request
from pyargs.files import write_json
from pyargs.heads import linear
from pyargs.lm import lora
from pyargs.lm.stack import keep
from pyargs.models.reward_model import RewardModel
from pyargs.ops import topk_logprobs
from pyargs.types import Users

WEIGHT = 1.8  # of the random rewards below: the policy's favourite then wins in about half of the steps
USERS = [f"user_{i}" for i in range(8)]
COLUMNS = [
    "B", "T", "HF ms", "reference ms", "greedy ms", "pyargs ms", "pyargs tok/s", "reference/pyargs", "HF/pyargs",
    "pyargs/greedy", "top-1", "missed", "of stream", "same tokens", "GB/s",
]  # fmt: skip


def models(name: str, dtype: torch.dtype):
    """The policy, its tokenizer, the random reward model on the same weights, and the same with LoRA merged into its own."""
    policy, tokenizer = pyargs.load_lm(name, dtype=dtype, device="cpu")
    policy.generation_config.eos_token_id = None  # every run has the length asked for
    backbone = lora.twin(policy.get_decoder())
    torch.manual_seed(0)
    lora.add(backbone, rank=8, alpha=16, rslora=True, target_modules=["q_proj", "v_proj"])
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    dim = policy.config.hidden_size
    users = Users(USERS, mixture=torch.randn(len(USERS), 8) * 2)
    head = linear.Head(dim, 8, users, softmax=True, divisor=dim**0.5)
    model = RewardModel(backbone, tokenizer, head).to(policy.device).eval()
    return policy, tokenizer, model, copy.deepcopy(model).merge()


def prompts(tokenizer, rows: int, length: int, start: int = 0) -> Tensor:
    """Stretches of ordinary English, int64 [rows, length]."""
    text = Path(pyargs.__file__).with_name("data") / "demo" / "prompts.txt"
    ids = tokenizer(text.read_text(encoding="utf-8").replace("\n", " "))["input_ids"]
    return torch.tensor([[ids[(start + 150 * row + t) % len(ids)] for t in range(length)] for row in range(rows)])


class Clock(StoppingCriteria):
    """Notes the time of every token, in each of the three loops."""

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, tokens: Tensor, scores: Tensor | None = None, **_) -> Tensor:
        if tokens.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    def step(self) -> float:
        """Median seconds of a step; the first after the prefill is left out."""
        return statistics.median(b - a for a, b in zip(self.times[1:], self.times[2:], strict=False))


class Timed(NamedTuple):
    """What a run chose, int64 [B, N]."""

    tokens: Tensor
    slots: Tensor


def loops(policy, model, merged, ids: Tensor, users: list[str], steps: int) -> dict[str, Callable[[Clock], object]]:
    mask = torch.ones_like(ids)

    def copies(clock: Clock) -> Timed:
        wish = dict(reward_weight=WEIGHT, num_candidates=10, max_new_tokens=steps)
        requests = [Request(tuple(row), user, **wish) for row, user in zip(ids.tolist(), users, strict=True)]
        found = reference.answers(policy, merged, requests, token_callback=clock)
        return Timed(torch.tensor([one.tokens for one in found]), torch.tensor([one.slots for one in found]))

    def ours(clock: Clock) -> Timed:
        engine = Engine(policy, model, max_rows=len(ids))
        numbers = [
            engine.submit(row, user, reward_weight=WEIGHT, max_new_tokens=steps, stop=[])
            for row, user in zip(ids.tolist(), users, strict=True)
        ]
        while engine.busy:
            clock(torch.tensor([event.token for event in engine.step()]))
        found = [engine.answer(number) for number in numbers]
        return Timed(torch.tensor([one.tokens for one in found]), torch.tensor([one.slots for one in found]))

    return {
        "HF": lambda clock: policy.generate(
            ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, pad_token_id=0, stopping_criteria=[clock]
        ),
        "reference": copies,
        "greedy": lambda clock: greedy(policy, model, ids, steps, clock),
        "pyargs": ours,
    }


@torch.no_grad()
def greedy(policy, model, ids: Tensor, steps: int, clock: Clock) -> None:
    """The policy alone through the stack that the decoder uses."""
    stack = keep.stack_of(policy, model.backbone)
    cache = stack.cache(len(ids), ids.shape[1] + steps)
    logits = stack.logits(stack(ids, cache)[:, -1], top=1)
    for _ in range(steps):
        token = topk_logprobs(logits, 1)[1]
        clock(token)
        logits = stack.logits(stack(token, cache)[:, 0], top=1)


def compare(policy, model, merged, batches: list[tuple[Tensor, list[str]]], steps: int, turns: int) -> dict:
    seconds: dict[str, list[float]] = {}
    slots, agree, rate = [], [], []
    for turn in range(-1, max(turns, len(batches))):  # the first is the warm-up
        ids, users = batches[turn % len(batches)]
        decoded = {}
        rate.append(streaming_rate(128))
        for name, fn in loops(policy, model, merged, ids, users, steps).items():
            clock = Clock()
            decoded[name] = fn(clock)
            if turn >= 0:
                seconds.setdefault(name, []).append(clock.step())
        slots.append(decoded["pyargs"].slots)
        # Tokens before the first difference: after it texts go apart.
        agree.append((decoded["pyargs"].tokens == decoded["reference"].tokens).long().cumprod(1).float().mean().item())
    ratio = lambda a, b: statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))  # noqa: E731
    ms = {name: statistics.median(values) * 1e3 for name, values in seconds.items()}
    chosen, rows = torch.cat(slots), len(batches[0][0])
    size = sum(p.numel() * p.element_size() for p in policy.parameters())
    return {
        "B": rows,
        "T": batches[0][0].shape[1],
        **{f"{name} ms": ms[name] for name in seconds},
        "pyargs tok/s": rows / ms["pyargs"] * 1e3,
        "reference/pyargs": ratio("reference", "pyargs"),
        "HF/pyargs": ratio("HF", "pyargs"),
        "pyargs/greedy": ratio("pyargs", "greedy"),
        "top-1": (chosen == 0).float().mean().item(),
        "missed": (chosen >= GUESSES.get(rows, 0)).float().mean().item(),
        "of stream": size / ms["pyargs"] / 1e6 / statistics.median(rate),
        "greedy of stream": size / ms["greedy"] / 1e6 / statistics.median(rate),
        "same tokens": "yes" if min(agree) == 1 else f"{statistics.mean(agree):.0%}",
        "GB/s": statistics.median(rate),
    }


def plot(rows: list[dict], title: str, file: Path) -> None:
    """Milliseconds of a step of each column, by size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    columns = {
        "reference": "reference loop",
        "HF": "generate, policy alone",
        "pyargs": "pyargs",
        "greedy": "pyargs, policy alone",
    }
    for i, (name, label) in enumerate(columns.items()):
        places = [n + (i - 1.5) * 0.2 for n in range(len(rows))]
        bars = axes.bar(places, [row[f"{name} ms"] for row in rows], 0.19, label=label)
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.set_xticks(range(len(rows)), [f"{row['B']} row{'s' * (row['B'] > 1)}, {row['T']} tokens" for row in rows])
    axes.set_ylabel("ms per step")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def main() -> None:
    given = options(
        __doc__,
        "a tiny random model, one row of 64 tokens and few steps",
        plot=dict(type=Path, metavar="FILE", help="draw them here (png, svg)"),
        dtype=dict(choices=["float32", "bfloat16"], default="float32", help="of policy and backbone"),
    )
    info = hardware()
    start = time.perf_counter()
    name = "tiny-random" if given.quick else "smollm2-135m"
    policy, tokenizer, model, merged = models(name, getattr(torch, given.dtype))
    keep.stack_of(policy, model.backbone)
    loading = time.perf_counter() - start
    print(f"{hardware_line(info)}\n{given.dtype}, k=10, reward_weight={WEIGHT}, prefill not counted", flush=True)
    print(f"loaded and packed in {loading:.1f} s", flush=True)

    rows = []
    for batch, length in tqdm([(1, 64)] if given.quick else [(1, 64), (1, 256), (8, 64), (8, 256)], unit="size"):
        steps, turns, several = (4, 1, 1) if given.quick else (16, 10, 10) if batch == 1 else (10, 4, 1)
        batches = [
            (prompts(tokenizer, batch, length, start=700 * (i // 2)).to(policy.device), (USERS[i % 2 :] + USERS)[:batch])
            for i in range(several)
        ]
        rows.append(compare(policy, model, merged, batches, steps, turns))
        tqdm.write(table(rows[-1:], COLUMNS), file=sys.stderr)
    print(table(rows, COLUMNS))
    short = {"float32": "fp32", "bfloat16": "bf16"}[given.dtype]
    if given.plot:
        plot(rows, f"SmolLM2-135M, k = 10, {given.dtype}, {info['cpu']}, {info['threads']} threads", given.plot)
    if given.json:
        ratios = {}
        for row in rows:
            where = f"b{row['B']}_t{row['T']}_{short}"
            ratios[f"ratio_{where}"] = round(row["reference/pyargs"], 3)
            ratios[f"hf_{where}"] = round(row["HF/pyargs"], 3)
            ratios[f"greedy_{where}"] = round(row["pyargs/greedy"], 3)
        ratios[f"ratio_b1_{short}"] = min(value for key, value in ratios.items() if key.startswith("ratio_b1"))
        result = {"hardware": info, "dtype": given.dtype, "reward_weight": WEIGHT, "load_and_pack_s": round(loading, 2)}
        write_json(given.json, {**result, **ratios, "rows": rows})


if __name__ == "__main__":
    main()
