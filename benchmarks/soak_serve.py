"""A service under load for ten minutes: memory stays flat, and every answer is the one that its request gets alone.

    python benchmarks/soak_serve.py [--minutes M] [--clients N] [--policy NAME] [--json FILE] [--quick]

`pyargs serve` runs as a process of its own, with a LoRE model trained on the demo pairs, a file of users, and a key for each
client. The clients ask both calls, with and without a stream, for one and for two answers, with log-probs and stop strings:
for users of the model, for nobody, and for users of their own, whom they add, adapt to, ask for and delete, also while an
answer of theirs comes. Some streams are closed in the middle, and a tenth of the requests is wrong on purpose, or for another
client's user, and must be refused. Afterwards each different request is asked of an engine that has nothing else to do: all
texts must be equal, and those that were closed its beginning. `growth` is the median of the memory of the service and the
process that adapts in the last minute beside that of the second one (--quick says nothing of it). Ends with 1 where anything
is not as it should be.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
from datasets import Dataset
from service import pairs_of, serving, trained
from timing import hardware, hardware_line, options, table

import pyargs
from pyargs.decode.engine import Engine
from pyargs.decode.request import numbered
from pyargs.files import write_json
from pyargs.serve import keys
from pyargs.serve.worker import add_nobody

GROWTH, VISITORS, TOKENS = 0.02, 8, 32
PROMPTS = [
    "How do I keep herbs alive in a small kitchen?",
    "Tell me about the sea.",
    "What should I cook tonight?",
    "Write a short note to a neighbour who is ill. " * 8,
    "I want to learn the piano at forty. Where do I begin?",
    "Hi",
]
STOPS = [None, None, "the ", "."]
HELLO = [{"role": "user", "content": "x"}]
WRONG = [
    (404, "/v1/chat/completions", {"model": "lore", "messages": HELLO, "user": "nobody-at-all"}),
    (404, "/v1/chat/completions", {"model": "other", "messages": HELLO}),
    (422, "/v1/chat/completions", {"model": "lore", "messages": HELLO, "temperature": -1}),
    (422, "/v1/chat/completions", {"model": "lore", "messages": HELLO, "tools": [{}]}),
    (422, "/v1/chat/completions", {"model": "lore", "messages": []}),
    (422, "/v1/completions", {"model": "lore", "prompt": [1, 2, 10**9]}),
    (404, "/v1/nothing", {}),
]


class Request(NamedTuple):
    """What decides an answer. which: of the answers of its call."""

    chat: bool
    user: str
    prompt: str
    seed: int
    which: int
    stop: str | None

    def body(self, answers: int) -> dict:
        asked = {"messages": [{"role": "user", "content": self.prompt}]} if self.chat else {"prompt": self.prompt}
        own = {"user": self.user, "strength": 1.0} if self.user else {}
        stop = {"stop": self.stop} if self.stop else {}
        return {"model": "lore", **asked, "seed": self.seed, "max_tokens": TOKENS, "n": answers, **own, **stop}


class Seen(NamedTuple):
    request: Request
    text: str
    complete: bool


class Client:
    """One who asks until the time is over. seen: every answer."""

    def __init__(self, number: int, http: httpx.AsyncClient, users: list[str], seen: list[Seen], counts: Counter):
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
                await self.ask(self.draw.choice([*self.users, ""]), stream=self.draw.random() < 0.6)

    async def ask(self, user: str, *, stream: bool, gone: bool = False) -> None:
        """gone: the user is deleted while the answer comes."""
        draw = self.draw
        request = Request(draw.random() < 0.7, user, draw.choice(PROMPTS), draw.randrange(3), 0, draw.choice(STOPS))
        answers, leaves = draw.choice([1, 1, 1, 2]), draw.random() < 0.15 and not gone
        path = "/v1/chat/completions" if request.chat else "/v1/completions"
        body = request.body(answers)
        if draw.random() < 0.3:
            body |= {"logprobs": True, "top_logprobs": 3} if request.chat else {"logprobs": 3}
        if not stream:
            answer = self.check(await self.http.post(path, json=body), 200)
            texts = [one["message"]["content"] if request.chat else one["text"] for one in answer["choices"]]
            self.note(request, texts, [True] * answers)
            return
        texts, ended, chunks = [""] * answers, [False] * answers, 0
        async with self.http.stream("POST", path, json=body | {"stream": True}) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                for one in chunk["choices"]:
                    texts[one["index"]] += (one["delta"].get("content") if request.chat else one["text"]) or ""
                    ended[one["index"]] |= one["finish_reason"] is not None
                chunks += 1
                if gone and chunks == 4:
                    self.check(await self.http.delete(f"/v1/users/{user}"), 200)
                    self.counts["deleted in an answer"] += 1
                if leaves and chunks > 4:
                    break
        assert leaves or all(ended), "a stream ended by itself"
        if gone and chunks < 4:
            self.check(await self.http.delete(f"/v1/users/{user}"), 200)
        self.note(request, texts, ended)

    async def wrong(self) -> None:
        other = {"model": "lore", "messages": HELLO, "user": f"client-{self.number + 1}-visitor-0"}
        status, path, body = self.draw.choice([*WRONG, (404, "/v1/chat/completions", other)])
        response = await self.http.post(path, json=body)
        assert response.status_code == status and response.json()["error"]["message"], (response.status_code, response.text)
        self.counts["refused"] += 1

    async def visitor(self) -> None:
        """A user of this client's own comes, is adapted to, asks, and goes."""
        which = self.draw.randrange(VISITORS)
        user = f"client-{self.number}-visitor-{which}"
        job = self.check(await self.http.post(f"/v1/users/{user}/pairs", json={"pairs": pairs_of(which)}), 202)
        while job["status"] in ("queued", "running"):
            await asyncio.sleep(0.2)
            job = self.check(await self.http.get(f"/v1/jobs/{job['id']}"), 200)
        assert job["status"] == "done", job
        if self.draw.random() < 0.5:
            await self.ask(user, stream=True, gone=True)
        else:
            await self.ask(user, stream=False)
            self.check(await self.http.delete(f"/v1/users/{user}"), 200)
        assert (await self.http.get(f"/v1/users/{user}")).status_code == 404
        self.counts["users added and deleted"] += 1

    def note(self, request: Request, texts: list[str], complete: list[bool]) -> None:
        for which, (text, whole) in enumerate(zip(texts, complete, strict=True)):
            self.seen.append(Seen(request._replace(which=which), text, whole))
            self.counts["answers" if whole else "closed in the middle"] += 1

    def check(self, response: httpx.Response, status: int) -> dict:
        assert response.status_code == status, (response.status_code, response.text)
        return response.json()


def alone(policy: str, folder: Path, requests: set[Request]) -> dict[Request, str]:
    """The text that each request gets of an engine that has nothing else to do."""
    engine = Engine(policy, str(folder), max_rows=1)
    model, found = engine.pair.model, {}
    add_nobody(model.users)
    for request in sorted(requests, key=str):
        if "-visitor-" in request.user and request.user not in model.known_users:
            pairs = pairs_of(int(request.user.rpartition("-")[2]))
            pyargs.adapt(model, Dataset.from_list([{**pair, "user_id": request.user, "split": "support"} for pair in pairs]))
        wish = dict(strength=1.0) if request.user else dict(reward_weight=0.0)
        prompt = [{"role": "user", "content": request.prompt}]
        if not request.chat:
            prompt = engine.pair.tokenizer(request.prompt)["input_ids"]
        own = dict(seed=[numbered(request.seed, request.which)], temperature=1.0, max_new_tokens=TOKENS)
        found[request] = engine.generate([prompt], [request.user], **own, **wish)[0].text
    return found


def as_alone(one: Seen, text: str) -> bool:
    """Whether an answer is what it is alone, whose text knows no stop string; or its beginning, where it was closed."""
    own = one.text.strip()
    if one.request.stop is not None and one.complete:
        text = text.partition(one.request.stop)[0].strip()
    return own == text if one.complete else text.startswith(own)


async def load(address: str, users: list[str], tokens: list[str], seconds: float, service: psutil.Process) -> tuple:
    """tokens: the clients' keys. Returns what they saw, counts, and (seconds, bytes) of the service's memory."""
    seen, counts, memory = [], Counter(), []
    each = [httpx.AsyncClient(base_url=address, timeout=600, headers={"Authorization": f"Bearer {token}"}) for token in tokens]
    until = time.monotonic() + seconds
    asking = asyncio.gather(*(Client(i, http, users, seen, counts).run(until) for i, http in enumerate(each)))
    while not asking.done():
        memory.append((time.monotonic() - until + seconds, resident(service)))
        await asyncio.wait([asking], timeout=1)
    await asking
    for http in each:
        await http.aclose()
    return seen, counts, memory


def resident(service: psutil.Process) -> int:
    """Bytes of a process and of those that it has started."""
    total = 0
    for process in (service, *service.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            pass
    return total


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
        folder, of_keys = Path(place) / "lore", f"{place}/keys.json"
        users = trained(policy, folder)
        tokens = [keys.new(of_keys, f"client-{i}", users=[*users, f"client-{i}-*"]) for i in range(clients)]
        more = ["--users", f"{place}/users.sqlite", "--api-keys", of_keys]
        with serving([str(folder), "--policy", policy, *more]) as (address, process):
            seen, counts, memory = asyncio.run(load(address, users, tokens, seconds, process))
        want = alone(policy, folder, {one.request for one in seen})
    wrong = [one for one in seen if not as_alone(one, want[one.request])]
    grown = None if given.quick else growth(memory, seconds)
    row = {
        **{"seconds": seconds, "clients": clients, "policy": policy},
        **counts,
        **{"different requests": len(want), "other than alone": len(wrong)},
        **{"MB": round(memory[-1][1] / 2**20), "growth": grown},
    }
    print(table([row], list(row)))
    for one in wrong[:3]:
        print("other than alone:", one, repr(want[one.request]))
    if given.json:
        write_json(given.json, {"hardware": info, "rows": [row]})
    return int(bool(wrong) or (grown is not None and grown > GROWTH) or not seen)


if __name__ == "__main__":
    sys.exit(main())
