"""What a store has acknowledged survives kill -9; what it has deleted is in no byte of its files."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import stored
from stored import MOST, apply, operations, pair

from pyargs.errors import PyargsError
from pyargs.serve.store import UserStore


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "users.sqlite"


@pytest.fixture
def store(path):
    made = UserStore(path, "a model")
    yield made
    made.close()


def statuses(store: UserStore, *jobs: dict) -> list[str]:
    return [store.job(job["id"])["status"] for job in jobs]


# -- users and jobs ----------------------------------------------------------------------------------------------------


def test_a_user_has_all_pairs_that_came_in_their_order(store, path):
    first = store.add("ann", [pair("a"), pair("b")], MOST)
    second = store.add("ann", [pair("c")], MOST)
    assert (first["status"], first["pairs"], second["pairs"]) == ("queued", 2, 3)
    work = store.take()
    assert (work.user, work.pairs) == ("ann", [pair("a"), pair("b"), pair("c")])
    assert statuses(store, first, second) == ["running", "running"], "one adaptation serves both"
    third = store.add("ann", [pair("d")], MOST)
    store.keep(work, b"vector", {"method": "lore"})
    assert statuses(store, first, second, third) == ["running", "running", "queued"], "done is what is served"
    store.finish(work)
    assert statuses(store, first, second, third) == ["done", "done", "queued"]
    assert len(store.take().pairs) == 4
    store.close()
    store = UserStore(path, "a model")
    found = store.user("ann")
    assert (found["pairs"], found["made"], list(store.vectors())) == (4, {"method": "lore"}, [("ann", b"vector")])
    assert found["job"]["id"] == third["id"] and found["created"] <= found["adapted"]
    assert statuses(store, first, third) == ["done", "queued"], "what was not done runs again"
    store.close()


def test_users_are_adapted_to_in_the_order_of_their_oldest_job(store):
    for user in ("ann", "bob", "ann", "cid"):
        store.add(user, [pair(user)], MOST)
    assert store.waiting == ["ann", "bob", "cid"]
    assert [store.take().user for _ in range(3)] == ["ann", "bob", "cid"]
    assert store.take() is None and len(store.waiting) == 3


def test_a_failed_job_says_why_and_one_that_was_put_back_waits(store):
    job = store.add("ann", [pair("a")], MOST)
    store.put_back(store.take())
    assert statuses(store, job) == ["queued"] and store.job(job["id"])["started"] is None
    store.finish(store.take(), "the loss is not finite")
    assert store.job(job["id"]) | {"status": "failed", "error": "the loss is not finite"} == store.job(job["id"])
    assert store.waiting == [] and list(store.vectors()) == []


def test_more_pairs_than_a_user_may_have_are_refused_and_leave_nothing(store):
    store.add("ann", [pair("a")], 2)
    with pytest.raises(PyargsError, match="at most 2 pairs: 1 are there, 2 came"):
        store.add("ann", [pair("b"), pair("c")], 2)
    with pytest.raises(PyargsError, match="at most 2 pairs: 0 are there"):
        store.add("bob", [pair("b")] * 3, 2)
    assert store.users == ["ann"] and store.user("bob") is None and store.user("ann")["pairs"] == 1
    assert len(store.take().pairs) == 1 and store.take() is None


def test_who_is_deleted_and_comes_again_is_somebody_else(store):
    job = store.add("ann", [pair("a")], MOST)
    work = store.take()
    assert store.has(work)
    store.delete("ann")
    assert not store.has(work) and "ann" not in store and store.user("ann") is None and store.job(job["id"]) is None
    store.add("ann", [pair("b")], MOST)
    assert not store.has(work), "the number is nobody else's"
    store.keep(work, b"of before", {})
    store.finish(work)
    assert list(store.vectors()) == [] and store.take().pairs == [pair("b")]


def test_marks_hold_without_the_id(store, path):
    assert store.marked(["ann", "bob"]) == []
    store.delete("a name that is not in clear", mark=True)
    store.delete("a name that is not in clear", mark=True)
    assert store.marked(["ann", "a name that is not in clear"]) == ["a name that is not in clear"]
    store.close()
    assert b"a name that is" not in path.read_bytes()
    again = UserStore(path, "a model")
    assert again.marked(["a name that is not in clear"]) == ["a name that is not in clear"] and again.users == []
    again.close()


def test_threads_share_a_store(store):
    def add(number: int) -> None:
        for _ in range(20):
            store.add(f"user {number % 2}", [pair(str(number))], MOST)
            store.take()

    threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(store.users) == ["user 0", "user 1"] and [store.user(user)["pairs"] for user in store.users] == [40, 40]


# -- what is refused ---------------------------------------------------------------------------------------------------


def run(code: str, *arguments) -> subprocess.Popen:
    """A process that runs a file, or code."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *([code] if code.endswith(".py") else ["-c", code]), *map(str, arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_file_is_one_process_s(store, path):
    code = "import sys; from pyargs.serve.store import UserStore; UserStore(sys.argv[1], 'a model')"
    said = run(code, path).communicate()[0]
    assert "users.sqlite is in use by another process" in said and "Fix:" in said
    with pytest.raises(PyargsError, match="in use"):
        UserStore(path, "a model")
    store.add("ann", [pair("a")], MOST)
    store.close()
    assert "in use" not in run(code, path).communicate()[0], "until it is closed"


def test_another_model_s_vectors_are_refused_and_stay(store, path):
    store.add("ann", [pair("a")], MOST)
    store.close()
    with pytest.raises(PyargsError, match="vectors for another model .* Fix: serve the folder"):
        UserStore(path, "another model")
    again = UserStore(path, "a model")
    assert again.users == ["ann"]
    again.close()


def test_what_is_no_store_is_refused_and_left_alone(tmp_path):
    text = tmp_path / "text"
    text.write_bytes(b"this is no database, and longer than a header of one would be" * 20)
    other = tmp_path / "other"
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE mine (a)")
    database.close()
    later = tmp_path / "later"
    UserStore(later, "a model").close()
    with sqlite3.connect(later) as database:
        database.execute("PRAGMA user_version = 7")
    database.close()
    for file, why in ((text, "cannot be used"), (other, "of another program"), (later, "of version 7, this pyargs reads 1")):
        before = file.read_bytes()
        file.chmod(0o640)
        with pytest.raises(PyargsError, match=f"{file}.*{why}.*Fix:"):
            UserStore(file, "a model")
        assert file.read_bytes() == before and file.stat().st_mode & 0o777 == 0o640
    with pytest.raises(PyargsError, match="cannot be opened"):
        UserStore(tmp_path / "no" / "folder", "a model")


def test_only_the_owner_reads_the_files(store, path):
    """Also of a store that came with a looser mode, as from a copy, or was killed with its log beside it."""

    def modes() -> set[int]:
        return {file.stat().st_mode & 0o777 for file in path.parent.glob("users.sqlite*")}

    store.add("ann", [pair("a")], MOST)
    assert modes() == {0o600}
    store.close()
    code = """
import os, sys
from pyargs.serve.store import UserStore
UserStore(sys.argv[1], "a model").add("bob", [{"chosen": "b"}], 10)
os._exit(9)
"""
    assert run(code, path).wait() == 9
    Path(f"{path}-shm").touch()
    for file in path.parent.glob("users.sqlite*"):
        file.chmod(0o644)
    again = UserStore(path, "a model")
    again.add("ann", [pair("a")], MOST)
    assert modes() == {0o600} and Path(f"{path}-wal").exists()
    again.close()


# -- killed ------------------------------------------------------------------------------------------------------------


def state(store: UserStore) -> tuple:
    """All that a store says, but for times and the names of jobs."""
    left = lambda one: one["job"] | dict.fromkeys(("id", "created", "started", "finished"))  # noqa: E731
    users = {user: (found["pairs"], left(found)) for user in store.users for found in [store.user(user)]}
    return users, dict(store.vectors()), store.marked([f"user-{i}" for i in range(6)]), store.waiting


@pytest.mark.parametrize("seed", range(10))
def test_kill_9_loses_nothing_that_was_acknowledged_and_leaves_no_half(seed, tmp_path):
    """The store holds what the acknowledged calls made, and of the one in flight all or nothing, or a vector whose job runs
    again."""
    rng, path = random.Random(seed), tmp_path / "users.sqlite"
    writer, done, stop = run(stored.__file__, path, seed), -1, rng.randrange(120)
    for line in writer.stdout:
        done = int(line)
        if done >= stop:
            break
    time.sleep(rng.random() * 0.004)
    writer.kill()
    for line in writer.communicate()[0].splitlines():
        done = int(line)
    assert done >= stop
    plain = UserStore(tmp_path / "plain.sqlite", "a model")
    allowed = []

    def noted(plain: UserStore) -> UserStore:
        plain.close()
        plain = UserStore(tmp_path / "plain.sqlite", "a model")  # what ran waits again
        allowed.append(state(plain))
        return plain

    for number, operation in enumerate(operations(seed)[: done + 2]):
        if number > done and operation[0] == "adapt" and (work := plain.take()):  # the vector is kept before the job is done
            plain.keep(work, f"{work.pairs}".encode(), {})
            plain = noted(plain)
        apply(plain, *operation)
        if number >= done:
            plain = noted(plain)
    plain.close()
    store = UserStore(path, "a model")
    assert state(store) in allowed, f"after {done}"
    store.close()


# -- deleted -----------------------------------------------------------------------------------------------------------


def files(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())


def remains(content: bytes, *secrets: bytes) -> list[bytes]:
    """Parts of 12 bytes of the secrets that the content holds."""
    parts = [secret[at : at + 12] for secret in secrets for at in range(0, max(1, len(secret) - 11), 12)]
    return [part for part in parts if part in content]


@pytest.mark.parametrize(
    "seed, count, texts, vectors",
    [(5, 300, (20, 60), (32, 64)), (12, 300, (100, 200), (16, 100)), (1, 150, (10, 400, 3000), (16, 1500))],
)
def test_no_byte_of_who_was_deleted_is_left(seed, count, texts, vectors, path):
    """Rows of all sizes move between pages as others come and go. With `secure_delete` alone, without a page of zeros in
    front, the first two seeds leave some of them behind."""
    rng, secrets, gone = random.Random(seed), {}, []
    store = UserStore(path, "a model")
    store._ask("PRAGMA synchronous = OFF")  # the same bytes, sooner
    for _ in range(count):
        what = rng.random()
        if what < 0.35 or not secrets:
            user = rng.randbytes(rng.choice([8, 20, 50])).hex()
            secrets[user] = [user.encode()]
        else:
            user = rng.choice(list(secrets))
        if what < 0.6:
            text = rng.randbytes(rng.choice(texts)).hex()
            store.add(user, [text], MOST)
            secrets[user].append(text.encode())
        elif what < 0.8 and (work := store.take()):
            vector = rng.randbytes(rng.choice(vectors))
            store.keep(work, vector, {})
            store.finish(work, None if what < 0.78 else vector.hex())
            secrets[work.user] += [vector, vector.hex().encode()]
        elif what > 0.85:
            store.delete(user, mark=what > 0.98)
            gone += secrets.pop(user)
    here = files(path.parent)
    assert len(gone) > 20 and not remains(here, *gone)
    assert all(remains(here, user.encode()) for user in store.users), "the search finds what is there"
    store.close()
    assert not remains(files(path.parent), *gone)


def test_a_deletion_that_was_killed_is_finished_when_the_file_is_opened(store, path):
    secret = "a text of which nothing is to be left"
    store.add("ann", [pair(secret)], MOST)
    store.close()
    code = """
import os, sys
from pyargs.serve.store import UserStore
store = UserStore(sys.argv[1], "a model")
store.add("bob", [{"chosen": sys.argv[2]}], 10)
store._truncate = lambda: os._exit(9)
store.delete("ann")
store.delete("bob")
"""
    assert run(code, path, secret).wait() == 9
    assert secret.encode() in files(path.parent), "killed between the commit and the emptying of the log"
    again = UserStore(path, "a model")
    assert again.users == ["bob"]
    again.delete("bob")
    assert secret.encode() not in files(path.parent)
    again.close()
