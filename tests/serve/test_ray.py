"""The service on Ray: what one replica has answered the next call finds on any other, and a replica may die under load."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import httpx
import openai
import psutil
import pytest
import serving
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from small import config_of, saved

from pyargs.decode.engine import Engine
from pyargs.errors import PyargsError
from pyargs.models import load_model
from pyargs.serve.adapting import vectors_for
from pyargs.serve.store import TooManyPairs
from pyargs.training.hooks import method
from pyargs.types import Users

SECRET = "words that nobody else says: zyxwvut"


@pytest.fixture(scope="module")
def on_ray():
    """The module, which only those tests import that run: Ray takes seconds."""
    pytest.importorskip("ray", reason="the extra [ray] is not installed")
    from pyargs.serve import ray

    return ray


@pytest.fixture(scope="module")
def folder(lm_folder, tmp_path_factory) -> str:
    """A model of the users a, b, c and d."""
    folder = tmp_path_factory.mktemp("model") / "lore"
    saved(method("lore"), config_of("lore", lm_folder, freeze_backbone=True, adapt_steps=3), folder, lm_folder)
    return str(folder)


def pairs(number: int) -> dict:
    return {
        "pairs": [{"prompt": f"tell {i} {SECRET}", "chosen": f"cat dog {i}", "rejected": f"saw {i}"} for i in range(number)]
    }


# -- what a replica takes over -----------------------------------------------------------------------------------------


class Reference(Future):
    """What Ray gives for a call, of one that has ended."""

    def __init__(self, result):
        super().__init__()
        self.set_result(result)

    def future(self) -> Future:
        return self

    def __await__(self):
        yield from asyncio.sleep(0).__await__()
        return self.result()


class Here:
    """A handle of an actor that is an object here."""

    def __init__(self, made):
        self._made = made

    def __getattr__(self, name: str):
        class Method:
            remote = staticmethod(lambda *args, **more: Reference(getattr(self._made, name)(*args, **more)))

        return Method


class Owner:
    """An owner without a disk. folder: users of the model."""

    def __init__(self, folder, log):
        self.kept, self.gone, self.folder, self.log = {}, set(), folder, log

    def tell(self, user, value):
        if value is None:
            self.kept.pop(user, None)
            self.gone |= {user} & self.folder
        else:
            self.kept[user] = value
        self.log.tell(user, None if value is None else {"mixture": torch.full((1, 2), value)})

    def changes(self, seen):
        return self.log.since(seen)

    def ask(self, name, *args):
        if name == "vectors":
            return [(user, save({"mixture": torch.full((1, 2), value)})) for user, value in self.kept.items()]
        assert name == "marked"
        return [user for user in args[0] if user in self.gone]


class Engineless:
    """A worker that has a table alone."""

    def __init__(self, table):
        self.table = table

    def call(self, function):
        return Reference(function(None))


def shared(on_ray, owner: Owner, table: Users):
    made = on_ray.Shared.__new__(on_ray.Shared)
    made._owner, made._worker, made._users = Here(owner), Engineless(table), table
    made._fetching, made._known, made._seen = asyncio.Lock(), set(), owner.changes(None)[0]
    made.of_model = set(owner.folder)
    return made


events = st.one_of(
    st.tuples(st.just("tell"), st.sampled_from("axy"), st.sampled_from([None, 1.0, 2.0])),
    st.tuples(st.just("look"), st.integers(0, 1)),
    st.sampled_from([("restart",), ("forget",)]),
)


@given(st.lists(events, max_size=16))
@example([("tell", "x", 1.0), ("look", 0), ("tell", "x", None), ("restart",)])
@example([("tell", "x", 1.0), ("tell", "y", 1.0), ("look", 0), ("tell", "x", 2.0), ("forget",)])
@settings(deadline=None)
def test_a_replica_that_looks_has_the_owner_s_table(on_ray, several):
    """Whatever came, and whenever it looked last: also if its owner has begun a new life, or has forgotten. The users a and b
    are the folder's: once deleted, a may come from pairs."""
    owner = Owner({"a", "b"}, on_ray.Changes())
    tables = [Users(["a", "b"], mixture=torch.full((2, 2), -1.0)) for _ in range(2)]
    replicas = [shared(on_ray, owner, table) for table in tables]
    with pytest.MonkeyPatch.context() as patch:
        for what, *more in [*several, ("look", 0), ("look", 1)]:
            if what == "tell":
                user, value = more
                if value is None or user not in owner.folder or user in owner.gone:
                    owner.tell(user, value)
            elif what == "restart":
                owner.log = on_ray.Changes()
            elif what == "forget":
                patch.setattr(on_ray, "KEPT", -1.0)
                owner.changes(None)
                patch.undo()
                assert not owner.log._changes, "nobody stays in memory"
            else:
                replica, table = replicas[more[0]], tables[more[0]]
                asyncio.run(replica.current())
                folder = dict.fromkeys(owner.folder - owner.gone, -1.0)
                had = {user: table.vectors["mixture"][row].tolist()[0] for user, row in table.ids.items()}
                assert had == folder | owner.kept and replica.of_model == folder.keys()
                assert replica._seen == owner.changes(None)[0]


def test_metrics_of_all_replicas_stand_side_by_side(on_ray):
    one, two = on_ray.Metrics(), on_ray.Metrics()
    one.tokens.labels("prompt").inc(3)
    two.tokens.labels("prompt").inc(4)
    told = [("r2", [*two.registry.collect()]), ("r1", [*one.registry.collect()])]
    lines = on_ray.text_of(told).decode().splitlines()
    assert [line for line in lines if line.startswith("pyargs_tokens_total")] == [
        'pyargs_tokens_total{kind="prompt",replica="r1"} 3.0',
        'pyargs_tokens_total{kind="prompt",replica="r2"} 4.0',
    ]
    kinds = [line for line in lines if line.startswith("# TYPE")]
    assert len(kinds) == len(set(kinds))


def node(cpus: float, **more) -> dict:
    return {"Alive": True, "NodeID": "x", "Resources": {"CPU": cpus, **more}}


@pytest.mark.parametrize(
    ("cpus", "gpus", "replicas", "each"),
    [([2], 0, 2, 1), ([8, 4], 0, 3, 4), ([8, 4], 0, 4, 2), ([0, 9], 2, 2, 4), ([3], 0, 1, 3)],
)
def test_replicas_share_all_that_is_there(on_ray, monkeypatch, cpus, gpus, replicas, each):
    monkeypatch.setattr(on_ray.ray, "nodes", lambda: [node(one) for one in cpus] + [{"Alive": False}])
    monkeypatch.setattr(on_ray.ray, "cluster_resources", lambda: {"CPU": sum(cpus)} | ({"GPU": gpus} if gpus else {}))
    assert on_ray.share(replicas) == {"num_cpus": each, "num_gpus": int(gpus > 0)}
    for more, what in ((sum(cpus) + 1, "CPUs"), (gpus + 1, "2 GPUs"))[: 2 if gpus else 1]:
        with pytest.raises(PyargsError, match=f"each of {more} replicas wants its own, .* has .*{what}. Fix: fewer"):
            on_ray.share(more)


def test_another_machine_than_the_head_is_refused(on_ray, monkeypatch):
    monkeypatch.setattr(on_ray.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "x"))
    monkeypatch.setattr(on_ray.ray, "nodes", lambda: [node(2, **{"node:__internal_head__": 1.0})])
    on_ray.check_head()
    monkeypatch.setattr(on_ray.ray, "nodes", lambda: [node(2)])
    with pytest.raises(PyargsError, match="on the head of the cluster.* Fix: run this there"):
        on_ray.check_head()


def test_what_a_replica_refuses_is_one_line(on_ray, monkeypatch):
    told = 'It failed to start. Error:\n  File "x.py", line 3\npyargs.errors.PyargsError: no such folder. Fix: name one\n'
    for message, line in ((told, "no such folder. Fix: name one"), ("no memory", "the replicas do not start: it failed")):
        app = SimpleNamespace(deployments={on_ray.NAME: SimpleNamespace(message=message)})
        monkeypatch.setattr(on_ray.serve, "status", lambda app=app: SimpleNamespace(applications={on_ray.NAME: app}))
        with pytest.raises(PyargsError, match=f"^{line}$"), on_ray.said_by_replicas():
            raise RuntimeError("it failed")


def test_the_owner_is_asked_for_what_its_store_has(on_ray, folder, tmp_path):
    """What a replica asks by name is there, and errors are the store's own."""
    file = tmp_path / "users.sqlite"
    owner = on_ray.Owner(str(file), folder, None, 1)
    try:
        assert owner.about() == (file, on_ray.identity(on_ray.locate(folder)))
        made = on_ray.Shared.__new__(on_ray.Shared)
        made._owner = Here(owner)
        assert (made.users, made.waiting, "x" in made, made.user("x"), made.job("x")) == ([], [], False, None, None)
        assert (made.vectors(), made.marked(["a"])) == ([], [])
        with pytest.raises(TooManyPairs):
            made.add("x", pairs(2)["pairs"], 1)
        version, _ = owner.changes(None)
        made.delete("a")
        assert made.marked(["a", "b"]) == ["a"] and owner.changes(version)[1] == [("a", None)]
    finally:
        owner.stop()


# -- a cluster ---------------------------------------------------------------------------------------------------------

USERS = ["a", "b", "né w/1"]


@pytest.fixture
def cluster(on_ray, folder, lm_folder, tmp_path):
    """(the process of `pyargs serve --on ray`, a client of it, a folder with all that Ray writes, lines of stderr)."""
    place = Path(tempfile.mkdtemp(prefix="ray"))  # Ray's sockets want a short name
    words = ["serve", folder, "--policy", lm_folder, "--users", str(tmp_path / "users.sqlite"), "--port", "0"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "RAY_ADDRESS": "local", "RAY_TMPDIR": str(place)}
    env |= {"RAY_worker_niceness": "0", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "pyargs.cli", *words, "--on", "ray", "--replicas", "2"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    lines, found = [], None
    try:
        while found is None:
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
            found = re.search(r"serving lore \(2 on Ray\) at (http\S+)/v1", lines[-1])
        threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True).start()
        with httpx.Client(base_url=found[1], timeout=600) as client:
            yield process, client, place, lines
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(place, ignore_errors=True)


def body(user: str, **more) -> dict:
    asked = {"model": "lore", "messages": serving.messages("tell me"), "user": user, "max_tokens": 12, "temperature": 0}
    return asked | {"reward_weight": 5.0} | more


def workers(process, kind: str) -> list[psutil.Process]:
    """Processes of actors of a class: Ray writes it into their titles."""
    return [one for one in psutil.Process(process.pid).children(recursive=True) if kind in "".join(one.cmdline()[:1])]


def until(condition, seconds: float = 300.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.05)
    return found


@pytest.mark.nightly
def test_two_replicas_are_one_service(cluster, folder, lm_folder):
    """Users come, change and go through any of them; one is killed under load, then the owner of the users; nothing of a user
    is in what Ray writes; SIGTERM lets an answer end."""
    process, client, place, lines = cluster
    model = load_model(folder)
    model.users.append(USERS[2:], **vectors_for(load_model(folder), USERS[2], pairs(1)["pairs"] + pairs(2)["pairs"]))
    engine, asked = Engine(lm_folder, model, backend="cpu"), serving.messages("tell me")
    alone = {user: engine.generate([asked], [user], reward_weight=5.0, max_new_tokens=12)[0].rewards for user in USERS}

    def ask(user: str) -> int | list[float]:
        answer = client.post("/v1/chat/completions", json=body(user))
        return answer.json()["choices"][0]["pyargs"]["rewards"] if answer.status_code == 200 else answer.status_code

    def add(user: str, several: dict) -> None:
        told = client.post(f"/v1/users/{quote(user, safe='')}/pairs", json=several)
        assert told.status_code == 202, told.text
        job = f"/v1/jobs/{told.json()['id']}"
        assert until(lambda: (found := client.get(job).json())["status"] in ("done", "failed") and found)["status"] == "done"

    assert client.get("/health").json() == {"status": "ok"} and "<html" in client.get("/").text
    assert ask(USERS[2]) == 404
    add(USERS[2], pairs(1))
    before = [ask(USERS[2]) for _ in range(8)]
    add(USERS[2], pairs(2))
    assert [ask(user) for user in USERS * 4] == [*alone.values()] * 4 and alone[USERS[2]] not in before and 404 not in before
    assert client.delete("/v1/users/c").status_code == 200 and [ask("c") for _ in range(8)] == [404] * 8
    assert [one["id"] for one in client.get("/v1/users").json()["data"]] == ["a", "b", "d", USERS[2]]
    answered = r'pyargs_requests_total{outcome="ok",path="/v1/chat/completions",replica="(\w+)"}'
    assert len(re.findall(answered, client.get("/metrics").text)) == 2, "both have answered"

    victim, counts = workers(process, "ServeReplica")[0], Counter()

    def load(number: int) -> None:
        with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=8, timeout=300) as asker:
            while counts["after"] < 24:
                user, when = USERS[number % 3], "after" if counts["killed"] else "before"
                wish = body(user)
                weight = {"reward_weight": wish.pop("reward_weight")}
                answer = asker.chat.completions.create(**wish, extra_body=weight)
                assert answer.choices[0].pyargs["rewards"] == alone[user]
                counts[when] += 1

    with ThreadPoolExecutor(4) as threads:
        running = [threads.submit(load, number) for number in range(4)]
        until(lambda: counts["before"] >= 8 or any(one.done() for one in running))
        victim.kill()
        counts["killed"] = 1
        for one in running:
            one.result(300)
    until(lambda: len(workers(process, "ServeReplica")) == 2)

    (owner,) = workers(process, "Owner")
    owner.kill()
    owner.wait(60)
    assert ask(USERS[2]) == alone[USERS[2]] and ask("c") == 404, "its next life has the file, and calls wait for it"
    assert client.delete(f"/v1/users/{quote(USERS[2], safe='')}").status_code == 200
    assert [ask(USERS[2]) for _ in range(8)] == [404] * 8

    with client.stream("POST", "/v1/chat/completions", json=body("a", max_tokens=400, stream=True)) as stream:
        next(stream.iter_lines())
    busy = r"^pyargs_rows{.*} [^0]"
    until(lambda: not re.search(busy, client.get("/metrics").text, re.MULTILINE))

    with client.stream("POST", "/v1/chat/completions", json=body("a", max_tokens=150, stream=True)) as stream:
        got = iter(stream.iter_lines())
        text = next(got)
        process.send_signal(signal.SIGTERM)
        text += "".join(got)
    assert text.endswith("data: [DONE]") and '"finish_reason":"length"' in text
    assert process.wait(120) == 0, "".join(lines)
    written = {str(file): file.read_bytes() for file in place.rglob("*") if file.is_file()} | {
        "stderr": "".join(lines).encode()
    }
    secrets = [b"zyxwvut", USERS[2].encode(), quote(USERS[2]).encode(), quote(USERS[2], safe="").encode(), b"/users/c"]
    assert not [name for name, content in written.items() if any(secret in content for secret in secrets)]
    assert sum(line.count('"path": "/v1/chat/completions"') for line in lines) > 50, "each request has its line"
