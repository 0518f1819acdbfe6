"""Adaptation in the background: `pyargs.adapt`'s vectors, from a process that keeps nothing and can be ended at any time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from formulas import USERS
from safetensors.torch import load, save
from small import config_of, edit, saved

from pyargs.errors import PyargsError
from pyargs.models import forget, load_model
from pyargs.serve import adapting
from pyargs.serve.adapting import Adapting, change, check_adapts, identity, load_same, restore
from pyargs.serve.store import UserStore
from pyargs.training.adapt import adapt
from pyargs.training.hooks import method
from pyargs.types import Users

SECRET = "say the words that nobody else has: zyxwvut"


def pairs(number: int, text: str = "cat dog") -> list[dict]:
    return [{"prompt": f"tell {i} {SECRET}", "chosen": f"{text} {i}", "rejected": f"saw axe {i}"} for i in range(number)]


def rows(user: str, pairs: list[dict]) -> Dataset:
    return Dataset.from_list([pair | {"user_id": user, "split": "support"} for pair in pairs])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, lm_folder) -> Path:
    """A model whose backbone is frozen, so that features would be cached, and whose new users begin at random."""
    folder = tmp_path_factory.mktemp("model") / "lore"
    config = config_of("lore", lm_folder, freeze_backbone=True, adapt_init="randn", adapt_steps=3)
    saved(method("lore"), config, folder, lm_folder)
    return folder


@pytest.fixture
def store(tmp_path, folder):
    (tmp_path / "store").mkdir()
    made = UserStore(tmp_path / "store" / "users.sqlite", identity(folder))
    yield made
    made.close()


@pytest.fixture
def table() -> Users:
    return Users(["ann", "bob"], mixture=torch.zeros(2, 3))


@pytest.fixture
def running(store, table, folder):
    made = Adapting(store, partial(change, table), folder, of_model=["ann", "bob"])
    yield made
    made.stop()


def until(condition, seconds: float = 1200.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.02)
    return found


def ended(store: UserStore, job: dict) -> dict:
    return until(lambda: (found := store.job(job["id"]))["status"] in ("done", "failed") and found)


# -- the process -------------------------------------------------------------------------------------------------------


def test_a_vector_is_what_adapt_gives_and_the_next_request_has_it(running, store, table, folder, tmp_path):
    """Of all pairs, bit for bit. Nothing of a user is in a file beside the store's, nor there once the user is deleted."""
    model = load_model(folder)
    assert ended(store, running.add("new user", pairs(3), 99))["status"] == "done"
    adapt(model, rows("new user", pairs(3)))
    assert torch.equal(table.vectors["mixture"][2], model.users.vectors["mixture"][-1])
    process = running.process
    more = [{**pair, "prompt": [{"role": "user", "content": pair["prompt"]}]} for pair in pairs(2, "red blue")]
    assert ended(store, running.add("new user", more, 99))["pairs"] == 5
    texts = [{**pair, "prompt": [{"role": "user", "content": pair["prompt"]}]} for pair in pairs(3)]
    adapt(model, rows("new user", texts + more), again=True)
    mixture = model.users.vectors["mixture"][-1].detach()
    assert torch.equal(table.vectors["mixture"][2], mixture) and len(table) == 3 and running.process is process
    ((user, vector),) = store.vectors()
    made = store.user(user)["made"]
    assert torch.equal(load(vector)["mixture"], mixture[None]) and (made["method"], made["pairs"]) == ("lore", 5)
    secrets = [b"zyxwvut", mixture.numpy().tobytes(), b"new user"]
    files = lambda: {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}  # noqa: E731
    holding = {file.parent.name for file, content in files().items() if any(secret in content for secret in secrets)}
    assert holding == {"store"}
    running.delete("new user")
    assert not [file for file, content in files().items() if any(secret in content for secret in secrets)]
    assert "new user" not in table.ids and not alive(process.pid), "which had seen the pairs"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_who_is_deleted_does_not_come_back_and_others_begin_anew(running, store, table):
    """The process is stopped in the middle of a job of one user, with pairs of another in its memory."""
    gone = running.add("gone", pairs(2), 99)
    until(lambda: running.process)
    os.kill(running.process.pid, signal.SIGSTOP)
    first = running.process.pid
    stays = running.add("stays", pairs(2), 99)
    running.delete("gone")
    assert store.job(gone["id"]) is None and not alive(first)
    until(lambda: running.process and running.process.pid != first)
    os.kill(running.process.pid, signal.SIGSTOP)
    running.process.seen.add(store.number("stays"))
    store.add("other", pairs(1), 99)
    running.process.seen.add(store.number("other"))
    running.delete("other")
    assert ended(store, stays)["status"] == "done"
    assert list(table.ids) == ["ann", "bob", "stays"]


def test_a_process_that_dies_twice_fails_its_job_alone(running, store, table):
    lost, pids = running.add("lost", pairs(1), 99), []
    for _ in range(2):
        until(lambda: running.process and running.process.pid not in pids)
        pids.append(running.process.pid)
        os.kill(pids[-1], signal.SIGKILL)
    found = ended(store, lost)
    assert found["status"] == "failed" and "the process that adapts has ended twice (-9)" in found["error"]
    bad = running.add("bad", [{"prompt": "", "chosen": 3, "rejected": "x"}], 99)
    assert ended(store, bad)["status"] == "failed" and SECRET not in ended(store, bad)["error"]
    assert ended(store, running.add("lost", pairs(1), 99))["status"] == "done"
    assert list(table.ids) == ["ann", "bob", "lost"] and len(list(store.vectors())) == 1


def test_a_process_that_died_while_it_was_idle_fails_nobody(running, store):
    assert ended(store, running.add("one", pairs(1), 99))["status"] == "done"
    os.kill(running.process.pid, signal.SIGKILL)
    assert ended(store, running.add("two", pairs(1), 99))["status"] == "done"


def test_an_adaptation_that_takes_too_long_is_ended_and_says_so(running, store, monkeypatch):
    monkeypatch.setattr(adapting, "SECONDS", 0.05)
    found = ended(store, running.add("slow", pairs(1), 99))
    assert found["status"] == "failed" and "it took more than 0.05 s and was ended" in found["error"]
    assert running.process is None, "the next one has a process and a time of its own"


def test_no_vector_is_of_another_model_than_the_one_that_is_served(store, table, folder, tmp_path):
    """The folder is written again, as by a training, before the process first loads it."""
    shutil.copytree(folder, tmp_path / "model")
    model = load_model(tmp_path / "model")
    model.head.directions.data += 1
    model.save_pretrained(tmp_path / "model")
    running = Adapting(store, partial(change, table), tmp_path / "model", of_model=["ann", "bob"])
    try:
        found = ended(store, running.add("new", pairs(1), 99))
        assert found["status"] == "failed" and "holds another model than the one that is served" in found["error"]
        assert not list(store.vectors()) and "new" not in table.ids
        shutil.rmtree(tmp_path / "model")
        shutil.copytree(folder, tmp_path / "model")
        assert ended(store, running.add("new", pairs(1), 99))["status"] == "done", "the folder was brought back"
    finally:
        running.stop()


def test_a_folder_that_is_written_while_it_is_loaded_is_not_taken(folder, tmp_path, monkeypatch):
    before, real = identity(folder), adapting.load_model
    monkeypatch.setattr(adapting, "load_model", lambda *given, **more: (real(*given, **more), written.append(1))[0])
    written = []
    monkeypatch.setattr(adapting, "identity", lambda folder: f"{before}{written or ''}")
    with pytest.raises(PyargsError, match="holds another model"):
        load_same(folder, before, None)


def test_stop_is_heard_also_where_the_thread_is_about_to_sleep(store, table, folder, monkeypatch):
    class Wake(threading.Event):
        def clear(self):
            running._stopping = True  # as `stop` does, which then waits for the thread
            self.set()
            super().clear()

    running = Adapting(store, partial(change, table), folder, of_model=["ann", "bob"])
    running.stop()
    running._stopping, running._wake = False, Wake()
    monkeypatch.setattr(store, "take", lambda: None)
    thread = threading.Thread(target=running._run, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


# -- the table ---------------------------------------------------------------------------------------------------------


def test_a_change_adds_exchanges_or_removes_one_row(table):
    before = table.vectors["mixture"].clone()
    change(table, "cid", {"mixture": torch.ones(1, 3)})
    change(table, "ann", {"mixture": torch.full((1, 3), 2.0)})
    assert list(table.ids) == ["ann", "bob", "cid"]
    assert table.vectors["mixture"].tolist() == [[2.0] * 3, before[1].tolist(), [1.0] * 3]
    change(table, "ann", None)
    change(table, "ann", None)
    assert sorted(table.ids) == ["bob", "cid"]


def test_a_restart_has_the_users_of_before(store, table):
    for user in ("cid", "dan", "eve"):
        store.add(user, pairs(1), 99)
        work = store.take()
        if user != "eve":
            store.keep(work, save({"mixture": torch.full((1, 3), float(work.number))}), {})
    store.delete("dan")
    store.delete("ann", mark=True)
    assert restore(store, table) == {"bob"}, "of the folder"
    assert sorted(table.ids) == ["bob", "cid"]
    assert table.vectors["mixture"][table.ids["cid"]].tolist() == [1.0] * 3
    with pytest.raises(PyargsError, match="'cid' is in .* and in the model's folder. Fix"):
        restore(store, table)


def test_a_vector_of_another_shape_is_refused(store, table):
    store.add("cid", pairs(1), 99)
    store.keep(store.take(), save({"mixture": torch.zeros(1, 4)}), {})
    with pytest.raises(PyargsError, match=r"users.sqlite: the vector of user 'cid' is {'mixture': \[1, 4\]}, and the model"):
        restore(store, table)
    assert list(table.ids) == ["ann", "bob"]


# -- which model -------------------------------------------------------------------------------------------------------


def test_the_identity_is_the_model_s_whoever_is_in_its_folder(folder, tmp_path, lm_folder):
    model = load_model(folder)
    adapt(model, rows("new", pairs(1)))
    forget(model, [USERS[0]])
    model.about["reward_std"] = {"0": 1.0}
    model.save_pretrained(tmp_path / "more")
    assert identity(tmp_path / "more") == identity(folder)
    model.head.directions.data += 1
    model.save_pretrained(tmp_path / "other")
    assert identity(tmp_path / "other") != identity(folder)
    edit(tmp_path / "more", lambda config: config["fields"].update(adapt_lr=0.7))
    assert identity(tmp_path / "more") != identity(folder) and json.loads(identity(folder))["method"] == "lore"


@pytest.mark.parametrize("name", ["global_rm", "genarm", "pdpo", "icl"])
def test_a_model_without_users_vectors_is_refused(name, lm_folder, tmp_path):
    model = saved(method(name), config_of(name, lm_folder), tmp_path / name, lm_folder)
    with pytest.raises(PyargsError, match="this model .*: there are no users' vectors to adapt. Fix: serve"):
        check_adapts(model)


def test_a_method_that_is_a_file_is_not_run(folder):
    model = load_model(folder)
    check_adapts(model)
    model.about["method"] = "mine.py"
    with pytest.raises(PyargsError, match="is not run"):
        check_adapts(model)
