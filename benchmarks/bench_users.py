"""Users known: what a guided step, a new user, and loading cost with 10, 10,000 and 1,000,000 of them.

    python benchmarks/bench_users.py [--json FILE] [--quick] [--threads N]

A tiny random model and SmolLM2-135M (--quick: the tiny one, and fewer users), each policy and reward model at once: LoRA on
the same weights, and a linear head of rank 8 as LoRE's, one row of 64 tokens, k = 10. The engines of all sizes take turns,
step by step. `step` is the least of the turns, its ratio the median of the turns' ratios to ten users; `fold` is what a
request costs when it joins; `fold all` is the same of everybody, as each call once took. `first add` meets a table that was
just loaded and makes memory of its own; `add` and `remove` are means of a thousand users one by one, growth included;
`unknown` is the error for a misspelt id. `load` and `MB` are of another process that loads the table: seconds the least of
five, MB by which its memory grows, and `file MB` the size of both files.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from timing import main
from tqdm import tqdm

import pyargs
from pyargs.decode.engine import Engine
from pyargs.errors import UnknownUser
from pyargs.heads import linear
from pyargs.lm import lora
from pyargs.models.reward_model import RewardModel
from pyargs.types import Users

RANK, NEW = 8, 1000
COLUMNS = [
    "model", "users", "step ms", "step ratio", "fold us", "fold ratio", "fold all us", "first add us", "add us", "remove us",
    "unknown us", "load ms", "MB", "file MB",
]  # fmt: skip

LOAD = """
import sys, time
from pathlib import Path
from pyargs.types import Users

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 if Path("/proc/self/statm").exists() else 0

Users.load(sys.argv[2])  # what is loaded once, whatever the table
seconds, before = [], resident()
for turn in range(5):
    start = time.perf_counter()
    users = Users.load(sys.argv[1])
    seconds.append(time.perf_counter() - start)
    if turn == 0:
        grown = resident() - before
    del users
print(min(seconds), grown)
"""


def table(count: int) -> Users:
    generator = torch.Generator().manual_seed(0)
    return Users([name(i) for i in range(count)], mixture=torch.randn(count, RANK, generator=generator) * 2)


def name(number: int) -> str:
    return f"user-{number:07d}"


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def turns(functions: dict[int, Callable[[], object]], count: int) -> dict[int, list[float]]:
    """Seconds of each function in each turn; they begin in turns, too."""
    found: dict[int, list[float]] = {key: [] for key in functions}
    keys = list(functions)
    for function in functions.values():
        function()
    for turn in range(count):
        for key in keys[turn % len(keys) :] + keys[: turn % len(keys)]:
            found[key].append(seconds(functions[key]))
    return found


def ratio(found: dict[int, list[float]], of: int) -> float:
    """Median of the turns' ratios to the fewest users."""
    return statistics.median(a / b for a, b in zip(found[of], found[min(found)], strict=True))


def models(model: str, tables: dict[int, Users]):
    """The policy, and a random reward model on its weights for each table."""
    policy, tokenizer = pyargs.load_lm(model, device="cpu")
    backbone = lora.twin(policy.get_decoder())
    torch.manual_seed(0)
    lora.add(backbone, rank=8, alpha=16, rslora=True, target_modules=["q_proj", "v_proj"])
    dim, made = policy.config.hidden_size, {}
    directions = torch.randn(RANK, dim)
    for count, users in tables.items():
        head = linear.Head(dim, RANK, users, softmax=True, divisor=dim**0.5)
        head.directions.data.copy_(directions)
        made[count] = RewardModel(backbone, tokenizer, head).eval()
    return policy, made


def steps(policy, models: dict[int, RewardModel], count: int) -> dict[int, list[float]]:
    prompt = torch.randint(3, 500, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    functions = {}
    for users, model in models.items():
        engine = Engine(policy, model, max_rows=1)
        engine.submit(prompt, name(users // 2), reward_weight=1.0, num_candidates=10, max_new_tokens=count + 4, stop=[])
        functions[users] = engine.step
    return turns(functions, count)


def come_and_go(folder: Path) -> dict[str, float]:
    """Microseconds of the first new user of a loaded table, and of a thousand that come and go one by one."""
    users, found = Users.load(folder), {}
    one = torch.zeros(1, RANK)
    found["first add us"] = seconds(lambda: users.append(["new"], mixture=one))
    new = [f"new {i}" for i in range(NEW)]
    found["add us"] = seconds(lambda: [users.append([user], mixture=one) for user in new]) / NEW
    found["remove us"] = seconds(lambda: [users.remove([user]) for user in new]) / NEW

    def unknown() -> None:
        try:
            users.rows(["user-0000x02"])
        except UnknownUser:
            return
        raise AssertionError("this user is not known")

    found["unknown us"] = min(seconds(unknown) for _ in range(5))
    return {name: value * 1e6 for name, value in found.items()}


def fold_all(model: RewardModel) -> None:
    for part in torch.arange(len(model.users)).split(1 << 16):
        model.head.fold(part)


def measure(quick: bool, rate: float) -> list[dict]:
    sizes, rows = (10, 100, 1000) if quick else (10, 10_000, 1_000_000), []
    tables = {count: table(count) for count in sizes}
    with tempfile.TemporaryDirectory() as folder:
        for count, users in tables.items():
            users.save(Path(folder) / str(count))
        for model in tqdm(["tiny-random"] if quick else ["tiny-random", "smollm2-135m"], unit="model"):
            policy, made = models(model, tables)
            stepped = steps(policy, made, 4 if quick else 400 if model == "tiny-random" else 150)
            row = {count: torch.tensor([count // 2]) for count in sizes}
            folded = turns({count: partial(made[count].head.fold, row[count]) for count in sizes}, 4 if quick else 2000)
            for count in sizes:
                place = Path(folder) / str(count)
                command = [sys.executable, "-c", LOAD, place, Path(folder) / str(min(sizes))]
                loaded = subprocess.run(command, capture_output=True, text=True, check=True)
                load, grown = map(float, loaded.stdout.split())
                rows.append(
                    {
                        "model": model,
                        "users": count,
                        "step ms": min(stepped[count]) * 1e3,
                        "step ratio": ratio(stepped, count),
                        "fold us": min(folded[count]) * 1e6,
                        "fold ratio": ratio(folded, count),
                        "fold all us": seconds(partial(fold_all, made[count])) * 1e6,
                        **come_and_go(place),
                        "load ms": load * 1e3,
                        "MB": grown / 1e6,
                        "file MB": sum(file.stat().st_size for file in place.iterdir()) / 1e6,
                    }
                )
    return rows


if __name__ == "__main__":
    main(__doc__, measure, COLUMNS)
