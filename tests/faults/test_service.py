"""`pyargs serve` is killed: what it acknowledged is there again, of what it did not all or nothing."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest
import serving
from killed import Commands
from small import config_of, saved

from pyargs.training.hooks import method


def pairs(number: int, text: str) -> dict:
    return {"pairs": [{"prompt": f"tell {i}", "chosen": f"{text} {i}", "rejected": f"saw {i}"} for i in range(number)]}


def wait_for(what, seconds: float = 120):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)
    return found


def children(pid: int) -> list[int]:
    return [int(one) for file in Path(f"/proc/{pid}/task").glob("*/children") for one in file.read_text().split()]


@pytest.fixture(scope="module")
def start(lm_folder, tmp_path_factory):
    """start(folder): the number of a process of the service, whose users' file is in the folder, and its address."""
    folder, commands, numbers = tmp_path_factory.mktemp("model") / "lore", Commands(hash_seed=1), iter(range(1000))
    saved(method("lore"), config_of("lore", lm_folder, freeze_backbone=True, adapt_steps=3), folder, lm_folder)

    def started(place: Path) -> tuple[int, str]:
        log = place / f"{next(numbers)}.log"
        words = ["serve", str(folder), "--policy", lm_folder, "--port", "0", "--users", "users.sqlite"]
        pid = commands.begin(place, words, log)
        return pid, wait_for(lambda: log.exists() and re.search(r"at (http\S+)/v1", log.read_text()))[1]

    yield started
    commands.close()


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_any_time_it_loses_no_answer_with_202(seed, start, tmp_path):
    """Killed at a seeded time, among calls or in an adaptation, whose process ends too. Users, pairs and deletions are there
    again, and jobs run."""
    rng, acknowledged, open_call = random.Random(seed), {"b": None}, None  # number of pairs; None: deleted
    pid, address = start(tmp_path)
    killer = threading.Timer(rng.uniform(0, 0.3 if seed % 2 else 6), os.kill, (pid, signal.SIGKILL))
    others = []
    with httpx.Client(base_url=address, timeout=60) as client:
        assert client.delete("/v1/users/b").status_code == 200
        killer.start()
        try:
            for number in range(12):
                user = f"user-{rng.randrange(5)}"
                others += children(pid)
                if rng.random() < 0.2 and acknowledged.get(user):
                    open_call = (user, None)
                    assert client.delete(f"/v1/users/{user}").status_code == 200
                else:
                    more = rng.randrange(1, 3)
                    open_call = (user, (acknowledged.get(user) or 0) + more)
                    told = client.post(f"/v1/users/{user}/pairs", json=pairs(more, f"red {number}"))
                    assert told.status_code == 202 and told.json()["pairs"] == open_call[1]
                acknowledged.update([open_call])
                open_call = None
        except httpx.TransportError:
            pass
    killer.join()
    wait_for(lambda: not any(Path(f"/proc/{one}").exists() for one in others))
    pid, address = start(tmp_path)
    try:
        with httpx.Client(base_url=address, timeout=60) as client:
            listed = {
                user["id"]: user["pairs"] for user in client.get("/v1/users").json()["data"] if user["source"] != "model"
            }
            wanted = {user: count for user, count in acknowledged.items() if count}
            also = wanted if open_call is None else {u: c for u, c in {**wanted, open_call[0]: open_call[1]}.items() if c}
            assert listed in (wanted, also) and client.get("/v1/users/b").status_code == 404
            for user in listed:
                wait_for(lambda user=user: client.get(f"/v1/users/{user}").json()["job"]["status"] == "done")
                wish = {
                    "model": "lore",
                    "messages": serving.messages("tell"),
                    "user": user,
                    "max_tokens": 2,
                    "reward_weight": 1.0,
                }
                assert client.post("/v1/chat/completions", json=wish).status_code == 200
    finally:
        os.kill(pid, signal.SIGKILL)
