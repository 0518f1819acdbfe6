"""The service over HTTP: what HTTP costs, the time between tokens while others come, and `transformers serve` beside it.

    python benchmarks/bench_http.py [--json FILE] [--quick] [--threads N]

SmolLM2-135M, at most 8 rows, clients that ask again as soon as their answer has ended and read it as a stream; prompts have
16 to 256 tokens, answers up to 8 to 128. Servers are processes of their own, and one of them is asked at a time.

`share`: the service, alone and guided (a LoRE model of the demo pairs), and the same requests in an engine without HTTP.
`of engine` is the tokens per second beside the engine's, `loop` the processor time of the service's event loop over all the
time, `us/token` the same for a token, `clients` what this script, which is all clients, takes itself.

`gaps`: four guided answers at a time, with nobody else, while prompts of 512 tokens join one after the other, while new users
are adapted to one after the other, and both. `of step` is p99 of the time between two tokens over its median with nobody else.

`peers`: the policy alone, here and in `transformers serve`, as it is and with continuous batching; greedy answers to chats.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
from bench_serve import PART, ROWS, Load, Wanted, points, workload
from service import pairs_of, serving, trained
from timing import hardware, hardware_line, options, streaming_rate, table

import pyargs
from pyargs.decode.engine import Engine
from pyargs.files import write_json

COLUMNS = [
    "what", "", "clients", "tokens/s", "first p50", "first p99", "gap p50", "gap p99", "of engine", "loop", "us/token",
    "clients' share", "of step", "of ours",
]  # fmt: skip
WORDS = "the river ran past old stone houses and nobody in them knew where it came from or how far it went ".split()


class Seen(NamedTuple):
    """One answer: seconds to its first text, and between two pieces of it; its tokens."""

    first: float
    gaps: list[float]
    tokens: int


async def ask(http: httpx.AsyncClient, path: str, body: dict) -> Seen:
    last = asked = time.perf_counter()
    first, gaps, pieces, told = None, [], 0, None
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with http.stream("POST", path, json=body) as response:
        if response.status_code != 200:
            raise RuntimeError((await response.aread()).decode())
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk, now = json.loads(line[6:]), time.perf_counter()
            if "error" in chunk:
                raise RuntimeError(chunk["error"])
            told = chunk.get("usage") or told
            if any(one.get("text") or one.get("delta", {}).get("content") for one in chunk.get("choices", [])):
                pieces += 1
                if first is None:
                    first = now - asked
                else:
                    gaps.append(now - last)
                last = now
    return Seen(first if first is not None else last - asked, gaps, told["completion_tokens"] if told else pieces)


async def answers(address: str, path: str, bodies: list[dict], clients: int) -> list[Seen]:
    left, seen = deque(bodies), []

    async def client(http: httpx.AsyncClient) -> None:
        while left:
            seen.append(await ask(http, path, left.popleft()))

    async with session(address) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    return seen


def session(address: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=address, timeout=None)


def load(address: str, path: str, bodies: list[dict], clients: int, service: psutil.Process | None = None) -> dict:
    own, start = time.process_time(), time.perf_counter()
    before = loop_seconds(service)
    seen = asyncio.run(answers(address, path, bodies, clients))
    seconds, tokens = time.perf_counter() - start, sum(one.tokens for one in seen)
    numbers = {
        "clients": clients,
        "tokens/s": tokens / seconds,
        **points([one.first for one in seen], [gap for one in seen for gap in one.gaps]),
    }
    if service is not None:
        used = loop_seconds(service) - before
        numbers |= {"loop": used / seconds, "us/token": used / tokens * 1e6}
    return numbers | {"clients' share": (time.process_time() - own) / seconds}


def loop_seconds(service: psutil.Process | None) -> float:
    """Processor seconds of the main thread, which has the event loop."""
    if service is None:
        return 0.0
    main = next(thread for thread in service.threads() if thread.id == service.pid)
    return main.user_time + main.system_time


# -- share -------------------------------------------------------------------------------------------------------------


def share(lm, policy: str, folder: Path, users: list[str], quick: bool) -> list[dict]:
    rows = []
    for name, model in (("alone", None), ("guided", pyargs.load_model(folder))):
        engine = Engine(lm, model, max_rows=ROWS, prefill_tokens=PART)
        wanted = workload(8 if quick else 24, len(lm.tokenizer), users if model else [""])
        more = {"reward_weight": 1.0} if model else {}
        bodies = [
            {"model": "lore" if model else Path(policy).name, "prompt": one.prompt, "user": one.user, "max_tokens": one.length}
            | {"temperature": 0, **more}
            for one in wanted
        ]
        with serving([*([str(folder)] if model else []), "--policy", policy]) as (address, service):
            for clients in (4,) if quick else (1, 4, 16):
                own_stops = [Wanted(one.prompt, one.user, one.length, None) for one in wanted]
                bare = Load(engine, own_stops, clients, most=ROWS, closed=False).run()
                rows.append({"what": "share", "": f"{name}, engine", "clients": clients, **bare})
                found = load(address, "/v1/completions", bodies, clients, service)
                rows.append({"what": "share", "": name, **found, "of engine": found["tokens/s"] / bare["tokens/s"]})
                print(table(rows[-2:], COLUMNS), flush=True)
    return rows


# -- gaps --------------------------------------------------------------------------------------------------------------


def gaps(lm, policy: str, folder: Path, users: list[str], quick: bool) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as place:
        words = [str(folder), "--policy", policy, "--users", f"{place}/users.sqlite"]
        with serving(words) as (address, _):
            for who in ("nobody", "prompts of 512 tokens", "new users", "both"):
                joins, adapts = who in ("prompts of 512 tokens", "both"), who in ("new users", "both")
                found = asyncio.run(beside(address, len(lm.tokenizer), users, joins, adapts, 4 if quick else 16))
                rows.append({"what": "gaps", "": f"beside {who}", "clients": 4, **found})
                rows[-1]["of step"] = rows[-1]["gap p99"] / rows[0]["gap p50"]
                print(table(rows[-1:], COLUMNS), flush=True)
    return rows


async def beside(address: str, vocabulary: int, users: list[str], joins: bool, adapts: bool, count: int) -> dict:
    """Gaps of `count` guided answers, four at a time, while others join or are adapted to."""
    draw = random.Random(1)
    prompt = lambda length: [draw.randrange(vocabulary) for _ in range(length)]  # noqa: E731
    asked = dict(model="lore", temperature=0, reward_weight=1.0)
    bodies = [dict(**asked, prompt=prompt(32), user=draw.choice(users), max_tokens=64) for _ in range(count)]

    async def others() -> None:
        async with session(address) as http:
            while True:
                await ask(http, "/v1/completions", dict(**asked, prompt=prompt(512), user=draw.choice(users), max_tokens=4))

    async def adapting() -> None:
        async with session(address) as http:
            for number in range(10**6):
                job = (await http.post(f"/v1/users/new-{number}/pairs", json={"pairs": pairs_of(number % 8)})).json()
                while job["status"] in ("queued", "running"):
                    await asyncio.sleep(0.1)
                    job = (await http.get(f"/v1/jobs/{job['id']}")).json()
                if job["status"] != "done":
                    raise RuntimeError(job)

    tasks = [asyncio.ensure_future(work()) for work, on in ((others, joins), (adapting, adapts)) if on]
    start = time.perf_counter()
    main = asyncio.ensure_future(answers(address, "/v1/completions", bodies, 4))
    await asyncio.wait([main, *tasks], return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        if task.done():
            task.result()  # it goes on for ever, unless it fails
        task.cancel()
    seen = await main
    return {
        "tokens/s": sum(one.tokens for one in seen) / (time.perf_counter() - start),
        **points([one.first for one in seen], [gap for one in seen for gap in one.gaps]),
    }


# -- peers -------------------------------------------------------------------------------------------------------------


def peers(lm, policy: str, quick: bool) -> list[dict]:
    rows, draw = [], random.Random(2)
    lengths = [(draw.randint(16, 256), draw.randint(8, 128)) for _ in range(4 if quick else 12)]
    chats = [([{"role": "user", "content": " ".join(draw.choices(WORDS, k=size))}], most) for size, most in lengths]
    with tempfile.TemporaryDirectory() as place:
        lm.save_pretrained(place)
        lm.tokenizer.save_pretrained(place)
        servers = {
            "ours": lambda: serving(["--policy", policy, "--name", place]),
            "transformers serve": lambda: Transformers(place),
            "transformers serve, continuous batching": lambda: Transformers(place, "--continuous-batching"),
        }
        for clients in (2,) if quick else (1, 4, 16):
            ours = None
            for name, start in servers.items():
                bodies = [dict(model=place, messages=chat, max_tokens=most, temperature=0) for chat, most in chats]
                try:
                    with start() as (address, _):
                        asyncio.run(answers(address, "/v1/chat/completions", bodies[:1], 1))  # it loads what is loaded late
                        found = load(address, "/v1/chat/completions", bodies, clients)
                except (RuntimeError, httpx.HTTPError) as error:
                    rows.append({"what": "peers", "": name, "clients": clients, "failed": str(error)[:200]})
                    print(f"{name} failed: {str(error)[:200]}", flush=True)
                    continue
                ours = found["tokens/s"] if ours is None else ours
                rows.append({"what": "peers", "": name, **found, "of ours": found["tokens/s"] / ours})
                print(table(rows[-1:], COLUMNS), flush=True)
    return rows


class Transformers:
    """`transformers serve` of a folder, as a context like `serving`."""

    def __init__(self, folder: str, *words: str):
        self.port = str(random.randrange(20000, 30000))
        command = [
            str(Path(sys.executable).with_name("transformers")),
            "serve",
            folder,
            "--port",
            self.port,
            "--device",
            "cpu",
        ]
        self.process = subprocess.Popen(
            [*command, "--dtype", "float32", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def __enter__(self) -> tuple[str, psutil.Process]:
        address, until = f"http://localhost:{self.port}", time.monotonic() + 180
        while time.monotonic() < until and self.process.poll() is None:
            if alive(address):
                return address, psutil.Process(self.process.pid)
            time.sleep(0.5)
        self.__exit__()
        raise RuntimeError("it did not start")

    def __exit__(self, *_) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def alive(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health").status_code == 200
    except httpx.HTTPError:
        return False


def main() -> None:
    given = options(__doc__, "few requests, the tiny model", parts=dict(nargs="+", default=["share", "gaps", "peers"]))
    policy = "tiny-random" if given.quick else "smollm2-135m"
    info, rate = hardware(), streaming_rate(64 if given.quick else 256)
    print(f"{hardware_line(info)}\nreads memory at {rate:.1f} GB/s; times in ms", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "lore"
        users = trained(policy, folder)
        lm, _ = pyargs.load_lm(policy, device="cpu")
        if "share" in given.parts:
            rows += share(lm, policy, folder, users, given.quick)
        if "gaps" in given.parts:
            rows += gaps(lm, policy, folder, users, given.quick)
        if "peers" in given.parts:
            rows += peers(lm, policy, given.quick)
    print(table(rows, COLUMNS))
    if given.json:
        write_json(given.json, {"hardware": info, "streaming_gb_s": round(rate, 1), "rows": rows})


if __name__ == "__main__":
    main()
