"""Time of a guided step with fewer candidates, beside one with all ten and the policy alone.

    python benchmarks/bench_candidates.py [--json FILE] [--quick] [--threads N]

The models of `bench_decode.py`: SmolLM2-135M, and a reward model on the same weights, with LoRA or as a head alone. Rows are
chats of about 64 tokens, each of another user, and answers are greedy. `candidates`: how many a step tries of a row, `alone`
the share of steps in which one is left. `ten/ms`: how many times faster than with all ten, the median of a turn's ratios.
Prefill is not counted. All take turns in short runs.
"""

from __future__ import annotations

import statistics
import time

import torch
from bench_decode import USERS, WEIGHT, models
from timing import hardware, hardware_line, options, table

from pyargs.data import demo
from pyargs.decode.engine import Engine
from pyargs.files import write_json
from pyargs.lm import lora
from pyargs.lm.tokenize import encode_prompt
from pyargs.models.reward_model import RewardModel

WISHES = {
    "all ten": {},
    **{f"min_p {p}": {"min_p": p} for p in (0.01, 0.02, 0.05, 0.1, 0.2)},
    **{f"reward_clip {c}": {"reward_clip": c} for c in (0.5, 1.0)},
}
ALONE = "policy alone"
COLUMNS = ["model", "B", "wish", "ms", "ten/ms", "candidates", "alone"]


def chats(tokenizer, rows: int, length: int) -> list[list[int]]:
    """Ids of chats of a user's turn, which has questions until there are so many tokens."""
    found, questions = [], iter(demo.prompts())
    for _ in range(rows):
        text = next(questions)
        while len(encode_prompt(tokenizer, text)) < length:
            text += " " + next(questions)
        found.append(encode_prompt(tokenizer, text))
    return found


def run(engine: Engine, rows: list[list[int]], steps: int, wish: dict) -> float:
    """Median seconds of a step."""
    for row, user in zip(rows, USERS, strict=False):
        engine.submit(row, user if engine.pair.guided else "", max_new_tokens=steps, stop=[], **wish)
    times = []
    while engine.busy:
        engine.step()
        times.append(time.perf_counter())
    return statistics.median(b - a for a, b in zip(times[1:], times[2:], strict=False))


def tried(engine: Engine, rows: list[list[int]], steps: int, wish: dict) -> list[int]:
    """How many candidates each step of each row tries."""
    answers = engine.generate(rows, USERS[: len(rows)], max_new_tokens=steps, stop=[], logprobs=10, **wish)
    return [sum(one.reward is not None for one in told.candidates) for answer in answers for told in answer.told]


def measure(policy, model, name: str, rows: list[list[int]], steps: int, turns: int) -> list[dict]:
    guided, alone = (Engine(policy, one, max_rows=len(rows)) for one in (model, None))
    asked = {wish: {"reward_weight": WEIGHT, **more} for wish, more in WISHES.items()}
    seconds: dict[str, list[float]] = {wish: [] for wish in (*asked, ALONE)}
    for turn in range(-1, turns):  # the first is the warm-up
        for wish in seconds:
            found = run(alone, rows, steps, {}) if wish == ALONE else run(guided, rows, steps, asked[wish])
            if turn >= 0:
                seconds[wish].append(found)
    lines = []
    for wish, values in seconds.items():
        line = {"model": name, "B": len(rows), "wish": wish, "ms": statistics.median(values) * 1e3}
        line["ten/ms"] = statistics.median(a / b for a, b in zip(seconds["all ten"], values, strict=True))
        if wish != ALONE:
            counts = tried(guided, rows, steps, asked[wish])
            line |= {"candidates": statistics.mean(counts), "alone": sum(count == 1 for count in counts) / len(counts)}
        lines.append(line)
    return lines


def main() -> None:
    given = options(__doc__, "a tiny random model, two rows and few steps")
    info = hardware()
    policy, tokenizer, model, _ = models("tiny-random" if given.quick else "smollm2-135m", torch.float32)
    frozen = RewardModel(policy.get_decoder(), tokenizer, model.head).eval()
    assert lora.active(model.backbone) and not lora.active(frozen.backbone)
    print(f"{hardware_line(info)}\nfloat32, k=10, reward_weight={WEIGHT}, prefill not counted", flush=True)
    rows = []
    for batch in [2] if given.quick else [1, 8]:
        steps, turns = (4, 1) if given.quick else (16, 3)
        for name, one in (("LoRA", model), ("head", frozen)):
            rows += measure(policy, one, name, chats(tokenizer, batch, 64), steps, turns)
    print(table(rows, COLUMNS))
    if given.json:
        write_json(given.json, {"hardware": info, "reward_weight": WEIGHT, "rows": rows})


if __name__ == "__main__":
    main()
