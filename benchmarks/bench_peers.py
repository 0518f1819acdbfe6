"""Time of one decoding step beside llama.cpp, `generate`, the reference loop and the official rule, in turns and in one call.

    python benchmarks/bench_peers.py [--json FILE] [--plot FILE] [--quick] [--only WORDS] [--busy] [--compile] [--threads N]

SmolLM2-135M; 1 and 8 rows, prompts of 64 and 256. `alone` is the policy by itself; `guided` has a reward model with LoRA
(rank 8, random) on the same weights, and k = 10 candidates. llama.cpp comes from the wheel `xllamacpp`, with the embedded file
(Q4_1) and the same model in F32, BF16 and Q8_0; without the wheel (pip install xllamacpp) its lines are left out, which is
said. `prefill`: tokens/s of reading all prompts. `MB`: the weights of the policy; `of stream`: how long the memory takes to
deliver them once, over the time of a step. `tokens`: the share of the answer's tokens before the first that float32 has
otherwise.

Others change what they measure: with a load above 0.3 a core before it starts, or where the quartiles of a line's turns are
more than 15% apart (`spread`), no ratio is printed. --busy puts one busy loop on each core and compares with the idle step of
the same turn. --compile adds `generate` with a static cache and torch.compile, which takes minutes to begin.
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from bench_decode import USERS, WEIGHT, Clock, loops, models, prompts
from peers import LlamaCpp, gguf_file, official
from timing import hardware, hardware_line, options, streaming_rate, table
from tqdm import tqdm

from pyargs.decode.engine import Engine
from pyargs.files import write_json
from pyargs.lm.bits import find_gguf
from pyargs.lm.hub import resolve

SIZES = ["1x64", "1x256", "8x64", "8x256"]
BYTES = {"float32": 4, "bfloat16": 2, "int8": 34 / 32, "file": 20 / 32, "F32": 4, "BF16": 2, "Q8_0": 34 / 32, "Q4_1": 20 / 32}
IDLE, SPREAD = 0.3, 0.15
COLUMNS = ["line", "rows", "prompt", "ms", "prefill", "MB", "of stream", "tokens", "spread"]
RATIOS = {
    "float32 guided / reference": ("pyargs float32 guided", "reference"),
    "float32 guided / official": ("pyargs float32 guided", "official"),
    "float32 alone / generate": ("pyargs float32 alone", "generate"),
    "float32 alone / llama.cpp F32": ("pyargs float32 alone", "llama.cpp F32"),
    "bfloat16 alone / llama.cpp BF16": ("pyargs bfloat16 alone", "llama.cpp BF16"),
    "int8 alone / llama.cpp Q8_0": ("pyargs int8 alone", "llama.cpp Q8_0"),
    "int8 guided / llama.cpp Q8_0": ("pyargs int8 guided", "llama.cpp Q8_0"),
    "int8 guided / float32 guided": ("pyargs int8 guided", "pyargs float32 guided"),
    "file alone / llama.cpp Q4_1": ("pyargs file alone", "llama.cpp Q4_1"),
}


class Ours:
    """The engine, alone or guided, with weights in one dtype."""

    def __init__(self, name: str, dtype: str, guided: bool):
        self.policy, self.tokenizer, model, _ = loaded(name, dtype)
        self.model, self.wish = (model, dict(reward_weight=WEIGHT)) if guided else (None, {})

    def run(self, ids: torch.Tensor, steps: int) -> tuple[float, float, list[list[int]]]:
        engine, clock = Engine(self.policy, self.model, max_rows=len(ids)), Clock()
        start = time.perf_counter()
        numbers = [
            engine.submit(row, *([user] if self.model else []), max_new_tokens=steps, stop=[], **self.wish)
            for row, user in zip(ids.tolist(), USERS, strict=False)
        ]
        while engine.busy:
            clock(torch.tensor([event.token for event in engine.step()]))
        return clock.step(), clock.times[0] - start, [engine.answer(number).tokens for number in numbers]


class Loop:
    """One of the loops of bench_decode, `generate` with a static cache, or the official rule, in float32."""

    def __init__(self, name: str, what: str):
        self.policy, self.tokenizer, self.model, self.merged = loaded(name, "float32")
        self.what = what

    def run(self, ids: torch.Tensor, steps: int) -> tuple[float, float]:
        clock = Clock()
        start = time.perf_counter()
        if self.what == "official":
            head, user = self.model.head, torch.tensor(0)
            official(self.policy, self.merged.backbone, lambda states: head(states, user), ids, steps, WEIGHT, clock)
        elif self.what == "static":
            wish = dict(max_new_tokens=steps, do_sample=False, pad_token_id=0, cache_implementation="static")
            self.policy.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=[clock], **wish)
        else:
            loops(self.policy, self.model, self.merged, ids, USERS[: len(ids)], steps)[self.what](clock)
        return clock.step(), clock.times[0] - start


@functools.cache
def loaded(name: str, dtype: str):
    return models(name, dtype)


def lines_of(name: str, rows: int, room: int, given) -> dict[str, Callable]:
    """What is measured with so many rows: each makes its part when it is called."""
    found: dict[str, Callable] = {}
    for dtype in ["float32", "bfloat16", "int8", *(["file"] if name == "smollm2-135m" else [])]:
        for guided in (False, True):
            found[f"pyargs {dtype} {'guided' if guided else 'alone'}"] = lambda d=dtype, g=guided: Ours(name, d, g)
    found["generate"] = lambda: Loop(name, "HF")
    found["reference"] = lambda: Loop(name, "reference")
    if rows == 1:
        found["official"] = lambda: Loop(name, "official")
    if given.compile:
        found["generate, compiled"] = lambda: Loop(name, "static")
    if name == "smollm2-135m" and importlib.util.find_spec("xllamacpp"):
        source, threads = find_gguf(resolve(name)), torch.get_num_threads()
        for kind in ("F32", "BF16", "Q8_0", "Q4_1"):
            file = (lambda: source) if kind == "Q4_1" else functools.partial(gguf_file, source, kind)
            found[f"llama.cpp {kind}"] = lambda f=file: LlamaCpp(f(), rows, threads, room)
    return {line: make for line, make in found.items() if all(word in line for word in given.only.split())}


@contextmanager
def busy(processes: int):
    """A loop that does nothing useful on each core."""
    started = [multiprocessing.get_context("spawn").Process(target=_spin, daemon=True) for _ in range(processes)]
    for process in started:
        process.start()
    time.sleep(2)
    try:
        yield
    finally:
        for process in started:
            process.kill()


def _spin() -> None:
    while True:
        pass


def measure(name: str, rows: int, length: int, given, quiet: bool) -> list[dict]:
    """A table's lines of one size. All take turns."""
    steps, turns = (4, 1) if given.quick else (16, 7) if rows == 1 else (8, 4)
    lines = {line: make() for line, make in lines_of(name, rows, length + steps + 8, given).items()}
    seconds: dict[str, list[float]] = {line: [] for line in lines}
    reading, beside = ({line: [] for line in lines} for _ in range(2))
    rate, tokens = [], {}
    tokenizer = loaded(name, "float32")[1]
    for turn in range(-1, turns):  # the first is the warm-up
        ids = prompts(tokenizer, rows, length, start=700 * max(turn, 0))
        rate.append(streaming_rate(128))
        # The others' loops are slow, and never near: half of the turns and of the steps do for them.
        now = {line: part for line, part in lines.items() if not (turn % 2 and isinstance(part, Loop))}
        wanted = {line: max(steps // 2, 4) if isinstance(part, Loop) else steps for line, part in now.items()}
        for line, part in now.items():
            time.sleep(0.3)  # threads of llama.cpp spin for a tenth of a second behind their last step
            step, prefill, *answer = part.run(ids, wanted[line])
            if turn >= 0:
                seconds[line].append(step)
                reading[line].append(prefill)
                tokens.setdefault(line, []).extend(answer[0] if answer else [])
        if given.busy and turn >= 0:
            with busy(os.cpu_count()):
                for line, part in now.items():
                    beside[line].append(part.run(ids, wanted[line])[0])
    for part in lines.values():
        if isinstance(part, LlamaCpp):
            part.close()
    count = sum(p.numel() for p in loaded(name, "float32")[0].parameters())
    found = []
    for line, times in seconds.items():
        ms = statistics.median(times) * 1e3
        low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        spread = (high - low) * 1e3 / ms
        held = next((size for kind, size in BYTES.items() if kind in line.split()), 4) * count
        row = {
            "line": line, "rows": rows, "prompt": length, "ms": ms,
            "prefill": rows * length / statistics.median(reading[line]), "MB": held / 1e6,
            "of stream": held / statistics.median(rate) / ms / 1e6, "tokens": agreement(line, tokens), "spread": spread,
            "GB/s": statistics.median(rate),
        }  # fmt: skip
        if given.busy:
            row["busy / idle"] = statistics.median(b / a for a, b in zip(times, beside[line], strict=True))
        found.append(row)
    unsteady = {row["line"] for row in found if row["spread"] > SPREAD}
    for what, (one, other) in RATIOS.items():
        if one not in lines or other not in lines:
            continue
        steady = quiet and not {one, other} & unsteady
        ratio = statistics.median(seconds[one]) / statistics.median(seconds[other])
        found.append({"line": what, "rows": rows, "prompt": length, "ratio": ratio if steady else "not idle"})
    return found


def agreement(line: str, tokens: dict) -> float | str:
    """The share of tokens before the first that float32 has otherwise."""
    right = tokens.get(f"pyargs float32 {line.split()[-1]}")
    if not line.startswith("pyargs") or not right:
        return ""
    same = [
        (torch.tensor(a) == torch.tensor(b)).long().cumprod(0).float().mean() for a, b in zip(tokens[line], right, strict=True)
    ]
    return float(torch.stack(same).mean())


def plot(rows: list[dict], title: str, file: Path) -> None:
    """Milliseconds of a token against the bytes of the weights that it needs; the line is the memory's rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if "ms" in row and row["rows"] == 1 and row["prompt"] == 64]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    marks = {"alone": "o", "guided": "s", "llama.cpp": "^"}
    for row in rows:
        kind = row["line"].split()[-1] if row["line"].startswith("pyargs") else row["line"].split()[0]
        colour = "C0" if kind == "alone" else "C1" if kind == "guided" else "C2" if kind == "llama.cpp" else "0.5"
        axes.plot(row["MB"], row["ms"], marks.get(kind, "D"), color=colour)
        left = kind == "llama.cpp" or row["line"] == "reference"
        where = dict(xytext=(-6 if left else 6, -2), ha="right" if left else "left", textcoords="offset points")
        axes.annotate(row["line"], (row["MB"], row["ms"]), **where, fontsize=7)
    most = max(row["MB"] for row in rows) * 1.1
    rate = statistics.median(row["GB/s"] for row in rows)
    least = min(row["MB"] for row in rows) / 2
    axes.plot([least, most], [least / rate, most / rate], "--", color="0.7")
    axes.annotate(f"memory, {rate:.0f} GB/s", (least * 1.2, least / rate), fontsize=7, color="0.4", va="top")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.set_xticks([50, 100, 200, 500])
    axes.set_xlim(least, most * 2)
    axes.set_xlabel("MB of weights for a token")
    axes.set_ylabel("ms per token, one row")
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def main() -> None:
    given = options(
        __doc__,
        "a tiny random model, one row of 64 tokens and few steps",
        plot=dict(type=Path, metavar="FILE", help="draw one row behind 64 tokens here (png, svg)"),
        only=dict(default="", metavar="WORDS", help="only the lines that have all these words"),
        sizes=dict(nargs="+", default=SIZES, choices=SIZES, help="rows x tokens of the prompts (default: all four)"),
        busy=dict(action="store_true", help="also with one busy loop on each core"),
        compile=dict(action="store_true", help="also `generate` with a static cache and torch.compile"),
    )
    info, start = hardware(), time.perf_counter()
    quiet = info["load"] <= IDLE * info["cores"]
    name = "tiny-random" if given.quick else "smollm2-135m"
    print(f"{hardware_line(info)}\n{name}, k=10, reward_weight={WEIGHT}", flush=True)
    if not quiet:
        print(f"The machine is not idle: load {info['load']} on {info['cores']} cores. No ratio is printed.", flush=True)
    if not given.quick and not importlib.util.find_spec("xllamacpp"):
        print("llama.cpp is left out: pip install xllamacpp", flush=True)
    rows = []
    for size in tqdm(SIZES[:1] if given.quick else given.sizes, unit="size"):
        count, length = map(int, size.split("x"))
        rows += measure(name, count, length, given, quiet)
        columns = [*COLUMNS, *(["busy / idle"] if given.busy else [])]
        last = [row for row in rows if (row["rows"], row["prompt"]) == (count, length)]
        tqdm.write(table([row for row in last if "ms" in row], columns))
        tqdm.write(table([row for row in last if "ratio" in row], ["line", "rows", "prompt", "ratio"]) + "\n")
    if given.plot:
        plot(rows, f"SmolLM2-135M, {info['cpu']}, {info['threads']} threads", given.plot)
    if given.json:
        seconds = round(time.perf_counter() - start)
        write_json(given.json, {"hardware": info, "idle": quiet, "reward_weight": WEIGHT, "seconds": seconds, "rows": rows})


if __name__ == "__main__":
    main()
