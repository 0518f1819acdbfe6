"""Requests that come and go: an engine under 1, 4 and 16 clients, against closed batches and one request at a time.

    python benchmarks/bench_serve.py [--json FILE] [--quick] [--threads N]

Each client asks again as soon as its answer has ended, until 32 requests (--quick: 8) are answered; prompts have 16 to 256
tokens and answers 8 to 128, the same for everybody. SmolLM2-135M answers alone and guided (frozen backbone, a linear head of
rank 8 as LoRE's, k = 10), in at most 8 rows. `joining` is the service's way: requests come in between two steps, and long
prompts are read in parts. `closed` takes whoever waits when all rows are free, and drops rows that have ended. `one` answers
one request at a time, and is measured for one client. `first` is the time from a client's asking to its first token, `gap`
the time between two tokens of an answer, p50 and p99 in ms; `of closed` and `of one` are the tokens per second beside theirs.
`of ceiling`, for guided rows, is `of one` over what a full batch gives beside one row: eight rows of ten candidates are 80
rows of products.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import deque
from typing import NamedTuple

import torch
from timing import hardware, hardware_line, options, streaming_rate, table

import pyargs
from pyargs.decode.engine import Engine
from pyargs.files import write_json
from pyargs.heads import linear
from pyargs.models.reward_model import RewardModel
from pyargs.types import Users

ROWS, PART, RANK = 8, 32, 8
COLUMNS = [
    "", "clients", "way", "tokens/s", "first p50", "first p99", "gap p50", "gap p99", "of closed", "of one", "of ceiling",
]  # fmt: skip


class Wanted(NamedTuple):
    prompt: list[int]
    user: str
    length: int
    stop: list[int] | None = []  # none, so that each answer has its length


def workload(count: int, vocabulary: int, users: list[str]) -> list[Wanted]:
    draw = random.Random(0)
    ids = lambda: [draw.randrange(vocabulary) for _ in range(draw.randint(16, 256))]  # noqa: E731
    return [Wanted(ids(), draw.choice(users), draw.randint(8, 128)) for _ in range(count)]


def guide(lm) -> RewardModel:
    """A reward model on the policy's own weights, with users of its own."""
    generator = torch.Generator().manual_seed(0)
    users = Users([f"user-{i}" for i in range(16)], mixture=torch.randn(16, RANK, generator=generator))
    torch.manual_seed(0)
    head = linear.Head(lm.config.hidden_size, RANK, users, divisor=lm.config.hidden_size**0.5)
    return RewardModel(lm.get_decoder(), lm.tokenizer, head)


class Load:
    """Clients in one thread with the engine. most: how many requests it is given at a time; closed: only when it is idle."""

    def __init__(self, engine: Engine, wanted: list[Wanted], clients: int, *, most: int, closed: bool):
        self.engine, self.left, self.most, self.closed = engine, deque(wanted), most, closed
        self.waiting = deque((self.left.popleft(), 0.0) for _ in range(min(clients, len(wanted))))
        self.asked: dict[int, float] = {}
        self.last: dict[int, float] = {}
        self.first, self.gaps, self.tokens = [], [], 0

    def run(self) -> dict:
        self.start = time.perf_counter()
        while self.waiting or self.engine.busy:
            self._submit()
            events, now = self.engine.step(), time.perf_counter() - self.start
            for event in events:
                self._note(event, now)
        seconds = time.perf_counter() - self.start
        return {"tokens/s": self.tokens / seconds, **points(self.first, self.gaps)}

    def _submit(self) -> None:
        if self.closed and self.engine.busy:
            return
        while self.waiting and len(self.asked) < (self.most if self.closed else len(self.waiting) + len(self.asked)):
            one, asked = self.waiting.popleft()
            more = {"reward_weight": 1.0} if self.engine.pair.guided else {}
            number = self.engine.submit(one.prompt, one.user, max_new_tokens=one.length, stop=one.stop, **more)
            self.asked[number] = asked

    def _note(self, event, now: float) -> None:
        if event.error is not None:
            raise event.error
        self.tokens += 1
        if event.number in self.last:
            self.gaps.append(now - self.last[event.number])
        else:
            self.first.append(now - self.asked[event.number])
        self.last[event.number] = now
        if event.answer is not None:
            self.engine.answer(event.number)
            del self.asked[event.number], self.last[event.number]
            if self.left:
                self.waiting.append((self.left.popleft(), now))


def points(first: list[float], gaps: list[float]) -> dict:
    """p50 and p99 in ms of seconds to the first token, and between two tokens."""
    point = lambda values, p: statistics.quantiles(values, n=100, method="inclusive")[p - 1] * 1e3  # noqa: E731
    return {f"{name} p{p}": point(values, p) for name, values in (("first", first), ("gap", gaps)) for p in (50, 99)}


WAYS = {"joining": dict(most=ROWS, closed=False), "closed": dict(most=ROWS, closed=True), "one": dict(most=1, closed=True)}


def ceiling(make, wanted: list[Wanted]) -> float:
    """Tokens per second of a full batch beside one row, steps alone: 8 * seconds of a step of one row / of 8."""
    seconds = {}
    for rows in (1, ROWS):
        engine = make()
        for one in wanted[:rows]:
            engine.submit(one.prompt[:64], one.user, max_new_tokens=24, stop=[], reward_weight=1.0)
        engine.step()
        times = []
        while engine.busy:
            start = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - start)
        seconds[rows] = statistics.median(times[:20])
    return ROWS * seconds[1] / seconds[ROWS]


def measure(quick: bool) -> list[dict]:
    lm, _ = pyargs.load_lm("tiny-random" if quick else "smollm2-135m", device="cpu")
    rows = []
    for name, model in (("alone", None), ("guided", guide(lm))):
        engines = {way: Engine(lm, model, max_rows=ROWS, prefill_tokens=PART if way == "joining" else None) for way in WAYS}
        users = [""] if model is None else list(model.known_users)
        wanted = workload(8 if quick else 32, len(lm.tokenizer), users)
        most = ceiling(lambda model=model: Engine(lm, model, max_rows=ROWS), wanted) if model is not None else None
        one = Load(engines["one"], wanted, 1, **WAYS["one"]).run()
        for clients in (4,) if quick else (1, 4, 16):
            found = {way: Load(engines[way], wanted, clients, **WAYS[way]).run() for way in ("joining", "closed")} | {
                "one": one
            }
            for way, numbers in found.items() if clients == 1 or quick else list(found.items())[:2]:
                over = {f"of {other}": numbers["tokens/s"] / found[other]["tokens/s"] for other in ("closed", "one")}
                of_ceiling = {"of ceiling": over["of one"] / most} if most is not None and way == "joining" else {}
                rows.append({"": name, "clients": clients, "way": way, **numbers, **over, **of_ceiling})
                print(table(rows[-1:], COLUMNS), flush=True)
    return rows


def main() -> None:
    given = options(__doc__, "few requests of 4 clients")
    info, rate = hardware(), streaming_rate(64 if given.quick else 256)
    print(f"{hardware_line(info)}\nreads memory at {rate:.1f} GB/s; times in ms", flush=True)
    rows = measure(given.quick)
    print(table(rows, COLUMNS))
    if given.json:
        write_json(given.json, {"hardware": info, "streaming_gb_s": round(rate, 1), "rows": rows})


if __name__ == "__main__":
    main()
