"""Time of one decoding step: the decoder, the reference loop, and `generate` of the bare policy (greedy), side by side.

    python benchmarks/bench_decode.py [--json FILE] [--quick] [--dtype bfloat16] [--threads N]

Policy: SmolLM2-135M. Reward model: the same backbone with random LoRA (r=8 on q and v, merged) and a linear head of rank 8;
every row of a batch is another user. k = 10. The weight is such that rewards really steer: `top-1` is the share of steps in
which the policy's favourite won (a benchmark in which it always wins could skip the reward model). Prefill is not counted: a
step is the time between two tokens. The three take turns in short runs; ratios are medians of the ratios of a turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from timing import hardware, hardware_line, streaming_rate, table
from torch import Tensor
from tqdm import tqdm
from transformers import StoppingCriteria

import pyargs
from pyargs.decode import reference
from pyargs.decode.request import check
from pyargs.files import write_json
from pyargs.heads import linear
from pyargs.lm import lora
from pyargs.models.reward_model import RewardModel
from pyargs.types import Users

WEIGHT = 1.8  # of the random rewards below: the policy's favourite then wins in about half of the steps
USERS = [f"user_{i}" for i in range(8)]
COLUMNS = [
    "B", "T", "HF ms", "reference ms", "pyargs ms", "pyargs tok/s", "reference/HF", "pyargs/HF", "reference/pyargs", "top-1",
    "same tokens", "GB/s",
]  # fmt: skip


def models(dtype: torch.dtype):
    """The policy, its tokenizer and the random reward model, each with weights of its own."""
    policy, tokenizer = pyargs.load_lm("smollm2-135m", dtype=dtype)
    policy.generation_config.eos_token_id = None  # every run has the length asked for
    backbone = pyargs.load_lm("smollm2-135m", dtype=dtype)[0].get_decoder()
    torch.manual_seed(0)
    lora.add(backbone, rank=8, alpha=16, rslora=True, target_modules=["q_proj", "v_proj"])
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    dim = policy.config.hidden_size
    users = Users(USERS, mixture=torch.randn(len(USERS), 8) * 2)
    head = linear.Head(dim, 8, users, softmax=True, divisor=dim**0.5)
    return policy, tokenizer, RewardModel(backbone, tokenizer, head).to(policy.device).eval().merge()


def prompts(tokenizer, rows: int, length: int) -> Tensor:
    """Stretches of ordinary English, int64 [rows, length]."""
    text = Path(pyargs.__file__).with_name("data") / "demo" / "prompts.txt"
    ids = tokenizer(text.read_text(encoding="utf-8").replace("\n", " "))["input_ids"]
    return torch.tensor([[ids[(150 * row + t) % len(ids)] for t in range(length)] for row in range(rows)])


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


def loops(policy, model, ids: Tensor, steps: int) -> dict[str, Callable[[Clock], object]]:
    mask, users = torch.ones_like(ids), USERS[: len(ids)]
    options = dict(
        reward_weight=WEIGHT, num_candidates=10, max_new_tokens=steps, eos_token_id=[], pad_token_id=0, do_sample=False,
        temperature=1.0, seed=0, eos_reward="before", tokenizer=None,
    )  # fmt: skip

    def copies(clock: Clock):
        return reference.decode(policy, model, check(policy, model, ids, mask, users, **options, token_callback=clock))

    return {
        "HF": lambda clock: policy.generate(
            ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, pad_token_id=0, stopping_criteria=[clock]
        ),
        "reference": copies,
        "pyargs": lambda clock: pyargs.generate(policy, model, ids, mask, users, **options, token_callback=clock),
    }


def compare(policy, model, ids: Tensor, steps: int, turns: int) -> dict:
    seconds: dict[str, list[float]] = {}
    decoded, rate = {}, []
    fns = loops(policy, model, ids, steps)
    for name, fn in fns.items():  # also the warm-up
        decoded[name] = fn(Clock())
    for _ in range(turns):
        rate.append(streaming_rate(128))
        for name, fn in fns.items():
            clock = Clock()
            fn(clock)
            seconds.setdefault(name, []).append(clock.step())
    ratio = lambda a, b: statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))  # noqa: E731
    ms = {name: statistics.median(values) * 1e3 for name, values in seconds.items()}
    one, other = decoded["pyargs"].tokens, decoded["reference"].tokens
    agree = (one == other).long().cumprod(1).sum(1)  # tokens before the first difference: after it texts go apart
    return {
        "B": len(ids), "T": ids.shape[1], **{f"{name} ms": ms[name] for name in ("HF", "reference", "pyargs")},
        "pyargs tok/s": len(ids) / ms["pyargs"] * 1e3, "reference/HF": ratio("reference", "HF"),
        "pyargs/HF": ratio("pyargs", "HF"), "reference/pyargs": ratio("reference", "pyargs"),
        "top-1": (decoded["pyargs"].slots == 0).float().mean().item(),
        "same tokens": "yes" if (agree == steps).all() else f"{int(agree.sum())} of {one.numel()}",
        "GB/s": statistics.median(rate),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")
    parser.add_argument("--quick", action="store_true", help="one prompt of 64 tokens and few steps")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of policy and backbone")
    parser.add_argument("--threads", type=int, help="threads of torch and of the ops (default: torch's own choice)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    info = hardware()
    policy, tokenizer, model = models(getattr(torch, options.dtype))
    print(f"{hardware_line(info)}\n{options.dtype}, k=10, reward_weight={WEIGHT}, prefill not counted", flush=True)

    rows = []
    for batch, length in tqdm([(1, 64)] if options.quick else [(1, 64), (1, 256), (8, 64), (8, 256)], unit="size"):
        ids = prompts(tokenizer, batch, length).to(policy.device)
        steps, turns = (10, 3) if options.quick else (16, 5) if batch == 1 else (10, 3)
        rows.append(compare(policy, model, ids, steps, turns))
        tqdm.write(table(rows[-1:], COLUMNS), file=sys.stderr)
    print(table(rows, COLUMNS))
    if options.json:
        short = {"float32": "fp32", "bfloat16": "bf16"}[options.dtype]
        ratios = {}
        for row in rows:
            where = f"b{row['B']}_t{row['T']}_{short}"
            ratios[f"ratio_{where}"] = round(row["reference/pyargs"], 3)
            ratios[f"reference_to_hf_{where}"] = round(row["reference/HF"], 3)
            ratios[f"decoder_to_hf_{where}"] = round(row["pyargs/HF"], 3)
        result = {"hardware": info, "dtype": options.dtype, "reward_weight": WEIGHT, **ratios, "rows": rows}
        write_json(options.json, result)


if __name__ == "__main__":
    main()
