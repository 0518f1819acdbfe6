"""A service under load for ten minutes: memory stays flat, and every answer is the one that its request gets alone.

    python benchmarks/soak_serve.py [--minutes M] [--clients N] [--policy NAME] [--json FILE] [--quick]

`pyargs serve` runs as a process of its own, with a LoRE model trained on the demo pairs and a file of users. The clients ask
with and without a stream, for users of the model, for nobody, and for users of their own, whom they add, adapt to, ask for
and delete. Some streams are closed in the middle, and a tenth of the requests is wrong on purpose and must be refused.
Afterwards each different request is asked of an engine that has nothing else to do: all texts must be equal, and those that
were closed its beginning. `growth` is the median of the service's memory in the last minute beside that of the second one
(--quick says nothing of it). Ends with 1 where anything is not as it should be.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import cache
from pathlib import Path

import httpx
import psutil
from datasets import Dataset
from timing import hardware, hardware_line, options, table

import pyargs
from pyargs.decode.engine import Engine
from pyargs.decode.request import numbered
from pyargs.files import write_json
from pyargs.methods import lore
from pyargs.serve.worker import add_nobody

GROWTH, VISITORS = 0.02, 8
PROMPTS = [
    "How do I keep herbs alive in a small kitchen?",
    "Tell me about the sea.",
    "What should I cook tonight?",
    "Write a short note to a neighbour who is ill. " * 8,
    "I want to learn the piano at forty. Where do I begin?",
    "Hi",
]
WRONG = [
    (404, "/v1/chat/completions", {"model": "lore", "messages": [{"role": "user", "content": "x"}], "user": "nobody-at-all"}),
    (404, "/v1/chat/completions", {"model": "other", "messages": [{"role": "user", "content": "x"}]}),
    (422, "/v1/chat/completions", {"model": "lore", "messages": [{"role": "user", "content": "x"}], "temperature": -1}),
    (422, "/v1/chat/completions", {"model": "lore", "messages": [{"role": "user", "content": "x"}], "tools": [{}]}),
    (422, "/v1/chat/completions", {"model": "lore", "messages": []}),
    (422, "/v1/completions", {"model": "lore", "prompt": [1, 2, 10**9]}),
    (422, "/v1/users/someone/pairs", {"pairs": []}),
    (404, "/v1/nothing", {}),
]


class Client:
    """One who asks until the time is over. seen: every answer, as ((user, prompt, seed, strength), text, whether complete)."""

    def __init__(self, number: int, http: httpx.AsyncClient, users: list[str], seen: list, counts: Counter):
        self.draw, self.number, self.http, self.users = random.Random(number), number, http, users
        self.seen, self.counts = seen, counts

    async def run(self, until: float) -> None:
        while time.monotonic() < until:
            dice = self.draw.random()
            if dice < 0.1:
                await self.wrong()
            elif dice < 0.16:
                await self.visitor()
            else:
                await self.ask(self.draw.choice([*self.users, ""]))

    async def ask(self, user: str) -> None:
        request = user, self.draw.choice(PROMPTS), self.draw.randrange(3), 1.0 if user else None
        stream, leaves = self.draw.random() < 0.6, self.draw.random() < 0.15
        body = {"model": "lore", "messages": [{"role": "user", "content": request[1]}], "seed": request[2], "max_tokens": 32}
        body |= {"user": user, "strength": 1.0} if user else {}
        if not stream:
            answer = self.check(await self.http.post("/v1/chat/completions", json=body), 200)
            self.note(request, answer["choices"][0]["message"]["content"], True)
            return
        text, chunks = "", 0
        async with self.http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
                chunks += 1
                if leaves and chunks > 4:
                    break
        self.note(request, text, not leaves or chunks <= 4)

    async def wrong(self) -> None:
        status, path, body = self.draw.choice(WRONG)
        response = await self.http.post(path, json=body)
        assert response.status_code == status and response.json()["error"]["message"], (response.status_code, response.text)
        self.counts["refused"] += 1

    async def visitor(self) -> None:
        """A user of this client's own comes, is adapted to, asks, and goes."""
        which = self.draw.randrange(VISITORS)
        user = f"visitor-{which}-of-{self.number}"
        job = self.check(await self.http.post(f"/v1/users/{user}/pairs", json={"pairs": pairs_of(which)}), 202)
        while job["status"] in ("queued", "running"):
            await asyncio.sleep(0.2)
            job = self.check(await self.http.get(f"/v1/jobs/{job['id']}"), 200)
        assert job["status"] == "done", job
        await self.ask(user)
        self.check(await self.http.delete(f"/v1/users/{user}"), 200)
        assert (await self.http.get(f"/v1/users/{user}")).status_code == 404
        self.counts["users added and deleted"] += 1

    def note(self, request: tuple, text: str, complete: bool) -> None:
        self.seen.append((request, text, complete))
        self.counts["answers" if complete else "closed in the middle"] += 1

    def check(self, response: httpx.Response, status: int) -> dict:
        assert response.status_code == status, (response.status_code, response.text)
        return response.json()


@cache
def pairs_of(which: int) -> list[dict]:
    """Three pairs of a user of the demo set."""
    rows = list(pyargs.load_pairs("demo"))
    users = sorted({row["user_id"] for row in rows})
    own = [row for row in rows if row["user_id"] == users[which % len(users)]]
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in own[which : which + 3]]


def trained(policy: str, folder: Path) -> list[str]:
    """Saves a LoRE model; returns its users."""
    rows = pyargs.load_pairs("demo")
    model = pyargs.train("lore", rows, lore.Config(backbone=policy, freeze_backbone=True, rank=4, epochs=3))
    model.save_pretrained(folder)
    return list(model.known_users)


def alone(policy: str, folder: Path, requests: set[tuple]) -> dict[tuple, str]:
    """The text that each request gets of an engine that has nothing else to do."""
    engine = Engine(policy, str(folder), max_rows=1)
    model, found = engine.pair.model, {}
    add_nobody(model.users)
    for request in sorted(requests, key=str):
        user, prompt, seed, strength = request
        if user.startswith("visitor-") and user not in model.known_users:
            rows = [{**pair, "user_id": user, "split": "support"} for pair in pairs_of(int(user.split("-")[1]))]
            pyargs.adapt(model, Dataset.from_list(rows))
        wish = dict(strength=strength) if user else dict(reward_weight=0.0)
        messages = [{"role": "user", "content": prompt}]
        own = dict(seed=[numbered(seed, 0)], temperature=1.0, max_new_tokens=32)
        found[request] = engine.generate([messages], [user], **own, **wish)[0].text
    return found


async def load(address: str, users: list[str], seconds: float, clients: int, service: psutil.Process) -> tuple:
    seen, counts, memory = [], Counter(), []
    limits = httpx.Limits(max_connections=clients * 2)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as http:
        until = time.monotonic() + seconds
        asking = asyncio.gather(*(Client(i, http, users, seen, counts).run(until) for i in range(clients)))
        while not asking.done():
            memory.append((time.monotonic() - until + seconds, service.memory_info().rss))
            await asyncio.wait([asking], timeout=1)
        await asking
    return seen, counts, memory


def growth(memory: list[tuple[float, int]], seconds: float) -> float:
    """The last minute's median beside that of the second minute."""
    of = lambda start, end: statistics.median(rss for at, rss in memory if start <= at < end)  # noqa: E731
    return of(seconds - 60, seconds) / of(60, 120) - 1


def main() -> int:
    given = options(
        __doc__,
        "20 seconds of 4 clients, the tiny model",
        minutes=dict(type=float, default=10.0),
        clients=dict(type=int, default=16),
        policy=dict(default="smollm2-135m"),
    )
    policy = "tiny-random" if given.quick else given.policy
    seconds, clients = (20.0, 4) if given.quick else (given.minutes * 60, given.clients)
    info = hardware()
    print(hardware_line(info), flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "lore"
        users = trained(policy, folder)
        words = ["serve", str(folder), "--policy", policy, "--port", "0", "--users", f"{place}/users.sqlite"]
        process = subprocess.Popen([sys.executable, "-m", "pyargs.cli", *words], stderr=subprocess.PIPE, text=True)
        try:
            address = next(found[1] for line in process.stderr if (found := re.search(r"at (http\S+)/v1", line)))
            drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
            found = asyncio.run(load(address, users, seconds, clients, psutil.Process(process.pid)))
        finally:
            process.terminate()
            process.wait(60)
        drain.wait(10)
        seen, counts, memory = found
        want = alone(policy, folder, {request for request, *_ in seen})
    wrong = [
        (request, text, want[request])
        for request, text, complete in seen
        if text.strip() != want[request] and (complete or not want[request].startswith(text.strip()))
    ]
    grown = None if given.quick else growth(memory, seconds)
    row = {
        **{"seconds": seconds, "clients": clients, "policy": policy},
        **counts,
        **{"different requests": len(want), "other than alone": len(wrong)},
        **{"MB": round(memory[-1][1] / 2**20), "growth": grown},
    }
    print(table([row], list(row)))
    for one in wrong[:3]:
        print("other than alone:", one)
    if given.json:
        write_json(given.json, {"hardware": info, "rows": [row]})
    return int(bool(wrong) or (grown is not None and grown > GROWTH) or not seen)


if __name__ == "__main__":
    sys.exit(main())
