"""The calls about users: what is acknowledged is served and kept, what is deleted is gone, and nobody sees another's."""

from __future__ import annotations

import contextlib
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import serving
from small import config_of, saved

from pyargs.decode.engine import Engine
from pyargs.errors import PyargsError
from pyargs.models import load_model
from pyargs.serve import keys, users
from pyargs.serve.adapting import identity, open_users, vectors_for
from pyargs.serve.store import DiskError
from pyargs.serve.users import make_router
from pyargs.training.hooks import method

SECRET = "words that nobody else says: zyxwvut"


def pairs(number: int, text: str = "cat dog") -> dict:
    return {
        "pairs": [{"prompt": f"tell {i} {SECRET}", "chosen": f"{text} {i}", "rejected": f"saw {i}"} for i in range(number)]
    }


@pytest.fixture(scope="module")
def folder(lm_folder, tmp_path_factory) -> str:
    """A model of the users a, b, c and d."""
    folder = tmp_path_factory.mktemp("model") / "lore"
    saved(method("lore"), config_of("lore", lm_folder, freeze_backbone=True, adapt_steps=3), folder, lm_folder)
    return str(folder)


@contextlib.contextmanager
def service(policy: str, folder: str, file: Path | None, key_file: Path | None = None):
    """An HTTP client of a service, and what adapts in it."""
    engine = Engine(policy, folder, backend="cpu")
    with serving.worker(engine) as worker:
        adapting = None if file is None else open_users(file, worker, folder)
        app = serving.make_app(
            worker, model="tiny", keys=key_file and keys.Keys(key_file), routers=[make_router(worker, adapting)]
        )
        app.state.adapting = adapting
        try:
            with serving.served(app) as address, httpx.Client(base_url=address, timeout=1200) as client:
                yield client, adapting
        finally:
            if adapting is not None:
                adapting.stop()


def ask(client: httpx.Client, user: str, **more) -> httpx.Response:
    body = {"model": "tiny", "messages": serving.messages("tell me"), "user": user, "max_tokens": 5, "temperature": 0}
    return client.post("/v1/chat/completions", json=body | {"reward_weight": 5.0} | more)


def done(client: httpx.Client, job: dict, seconds: float = 1200.0) -> dict:
    end = time.monotonic() + seconds
    while (found := client.get(f"/v1/jobs/{job['id']}").json())["status"] not in ("done", "failed"):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def rewards(response: httpx.Response) -> list[float]:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["pyargs"]["rewards"]


def test_a_user_comes_is_served_changes_and_goes(lm_folder, folder, tmp_path):
    """Without a restart, and after one; answers are those of an engine with the vector that `pyargs.adapt` gives."""
    file, model = tmp_path / "users.sqlite", load_model(folder)
    alone = Engine(lm_folder, model, backend="cpu")
    expected = []
    for several in (pairs(2)["pairs"], pairs(2)["pairs"] + pairs(3, "red blue")["pairs"]):
        model.users.remove([user for user in ["né w/1"] if user in model.users.ids])
        model.users.append(["né w/1"], **vectors_for(load_model(folder), "né w/1", several))
        wish = dict(reward_weight=5.0, max_new_tokens=5)
        expected.append(alone.generate([serving.messages("tell me")], ["né w/1"], **wish)[0].rewards)
    assert expected[0] != expected[1]
    with service(lm_folder, folder, file) as (client, adapting):
        assert ask(client, "né w/1").status_code == 404
        told = client.post("/v1/users/né w%2F1/pairs", json=pairs(2))
        assert told.status_code == 202 and told.json()["status"] in ("queued", "running")
        assert (told.json()["user"], told.json()["pairs"], told.json()["object"]) == ("né w/1", 2, "job")
        assert done(client, told.json())["status"] == "done"
        assert rewards(ask(client, "né w/1")) == expected[0]
        assert done(client, client.post("/v1/users/né w%2F1/pairs", json=pairs(3, "red blue")).json())["pairs"] == 5
        assert rewards(ask(client, "né w/1")) == expected[1]
        found = client.get("/v1/users/né w%2F1").json()
        assert (found["source"], found["pairs"], found["job"]["status"]) == ("pairs", 5, "done")
        assert found["made"]["method"] == "lore" and lm_folder not in str(found)
        assert [user["id"] for user in client.get("/v1/users").json()["data"]] == ["a", "b", "c", "d", "né w/1"]
        assert client.get("/v1/users").json()["keeps"] is True
    with service(lm_folder, folder, file) as (client, adapting):
        assert rewards(ask(client, "né w/1")) == expected[1]
        gone = client.delete("/v1/users/né w%2F1")
        assert gone.json() == {"id": "né w/1", "object": "user", "deleted": True}
        assert client.delete("/v1/users/a").status_code == 200
        for user in ("né w%2F1", "a"):
            assert client.get(f"/v1/users/{user}").status_code == client.delete(f"/v1/users/{user}").status_code == 404
        assert ask(client, "né w/1").status_code == ask(client, "a").status_code == 404 and ask(client, "b").status_code == 200
    with service(lm_folder, folder, file) as (client, adapting):
        assert [user["id"] for user in client.get("/v1/users").json()["data"]] == ["b", "c", "d"]
        assert ask(client, "a").status_code == 404
    held = b"".join(one.read_bytes() for one in tmp_path.rglob("*") if one.is_file())
    assert not [secret for secret in (b"zyxwvut", "né w/1".encode()) if secret in held]


@pytest.fixture(scope="module")
def still(lm_folder, folder, tmp_path_factory):
    """A service whose adaptation waits, with keys: an admin's, and one of the users a and x-*."""
    place = tmp_path_factory.mktemp("still")
    admin, shop = keys.new(place / "keys", "ops", admin=True), keys.new(place / "keys", "shop", users=["a", "x-*"])
    with (
        pytest.MonkeyPatch.context() as patch,
        service(lm_folder, folder, place / "u.sqlite", place / "keys") as (client, adapting),
    ):
        patch.setattr(adapting, "_adapt", lambda work: None)
        as_ = lambda token: httpx.Client(base_url=client.base_url, headers={"Authorization": f"Bearer {token}"})  # noqa: E731
        yield as_(admin), as_(shop), adapting


def test_what_is_not_for_a_key_is_as_if_it_were_not_there(still):
    admin, shop, _ = still
    job = admin.post("/v1/users/y-1/pairs", json=pairs(1)).json()["id"]
    assert admin.get(f"/v1/jobs/{job}").status_code == 200
    said = [
        [(r.status_code, r.json()) for r in (shop.get(f"/v1/users/{user}"), shop.delete(f"/v1/users/{user}"), ask(shop, user))]
        for user in ("y-1", "b", "not there")
    ]
    assert said[0] == said[1] == said[2] and {status for status, _ in said[0]} == {404}
    posted = [shop.post(f"/v1/users/{user}/pairs", json=pairs(1)) for user in ("y-1", "b", "not there")]
    assert len({(r.status_code, r.text) for r in posted}) == 1 and posted[0].status_code == 404
    jobs = [shop.get(f"/v1/jobs/{one}") for one in (job, "0" * 32)]
    assert len({(r.status_code, r.text) for r in jobs}) == 1 and jobs[0].status_code == 404
    assert admin.get("/v1/users/y-1").json()["pairs"] == 1 and admin.get("/v1/users/b").status_code == 200
    assert shop.post("/v1/users/x-1/pairs", json=pairs(1)).status_code == 202
    assert [user["id"] for user in shop.get("/v1/users").json()["data"]] == ["a", "x-1"]
    assert httpx.get(f"{shop.base_url}/v1/users").status_code == 401


def test_a_user_who_is_being_adapted_to_is_told_apart_from_one_who_is_not_there(still):
    admin, shop, _ = still
    assert admin.post("/v1/users/y-2/pairs", json=pairs(1)).status_code == 202
    told = ask(admin, "y-2")
    assert told.status_code == 409 and told.json()["error"]["code"] == "user_not_ready"
    assert "GET /v1/users/ID" in told.json()["error"]["message"]
    assert ask(shop, "y-2").json() == ask(shop, "y-3").json()  # not this key's


def test_the_list_has_pages(still):
    admin, *_ = still
    seen, after = [], ""
    while True:
        page = admin.get("/v1/users", params={"limit": 2, "after": after}).json()
        seen += [user["id"] for user in page["data"]]
        if not page["has_more"]:
            break
        after = seen[-1]
    whole = [user["id"] for user in admin.get("/v1/users").json()["data"]]
    assert seen == whole == sorted(whole) and {"a", "b", "c", "d"} <= set(whole) and "" not in whole
    for wrong in ({"limit": 0}, {"limit": 1001}):
        assert admin.get("/v1/users", params=wrong).status_code == 422


def refused(response: httpx.Response, status: int, *words: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert all(word in str(error) for word in words), error
    assert SECRET not in str(error)


def test_what_is_wrong_is_refused_by_name_and_leaves_nothing(still, monkeypatch):
    admin, *_ = still
    before = admin.get("/v1/users").json()
    one = pairs(1)["pairs"][0]
    for change, word in (
        ({"chosen": 3}, "chosen"),
        ({"chosen": one["rejected"]}, "same text"),
        ({"rejected": "  "}, "rejected is empty"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [{"role": "nobody", "content": "x"}]}, "role"),
        ({"chosen": "x" * (users.TEXT + 1)}, "chosen"),
        ({"weight": 1}, "weight"),
    ):
        refused(admin.post("/v1/users/new/pairs", json={"pairs": [one, one | change]}), 422, "pairs[1]", word)
    refused(admin.post("/v1/users/new/pairs", json={"pairs": []}), 422, "pairs")
    refused(admin.post("/v1/users/new/pairs", json={"pairs": [one] * (users.PAIRS + 1)}), 422, "pairs")
    refused(admin.post("/v1/users/new/pairs", json={"pairs": [one], "user": "x"}), 422, "user")
    refused(admin.post("/v1/users/new/pairs", content=b"{", headers={"Content-Type": "application/json"}), 400, "JSON")
    refused(admin.post(f"/v1/users/{'n' * 129}/pairs", json=pairs(1)), 422, "user")
    refused(admin.post("/v1/users/n%07w/pairs", json=pairs(1)), 422, "control character")
    refused(admin.post("/v1/users/a/pairs", json=pairs(1)), 409, "user_of_the_model", "delete the user first")
    monkeypatch.setattr(users, "ALL_PAIRS", 1)
    refused(admin.post("/v1/users/new/pairs", json=pairs(2)), 409, "too_many_pairs", "at most 1 pairs")
    monkeypatch.setattr(users, "WAITING", 0)
    full = admin.post("/v1/users/new/pairs", json=pairs(1))
    refused(full, 429, "queue_full")
    assert int(full.headers["retry-after"]) > 0 and admin.get("/v1/users").json() == before


def test_one_who_is_deleted_while_the_list_is_told_is_not_in_it(still, monkeypatch):
    admin, _, adapting = still
    for user in ("x-goes", "x-stays"):
        admin.post(f"/v1/users/{user}/pairs", json=pairs(1))
    real = adapting.store.user

    def user(name):
        if name == "x-goes" and name in adapting.store:
            adapting.store.delete(name)
        return real(name)

    monkeypatch.setattr(adapting.store, "user", user)
    told = admin.get("/v1/users", params={"after": "x", "limit": 2}).json()
    assert [one["id"] for one in told["data"]][-1] == "x-stays" and "x-goes" not in str(told)


def test_a_deletion_that_the_disk_refuses_can_be_asked_for_again(still, monkeypatch):
    """Of a user of the folder: nobody serves them, they are not marked, and the vector is still the folder's."""
    admin, _, adapting = still
    with monkeypatch.context() as full:

        def refuse(user, *, mark):
            raise DiskError("no room")

        full.setattr(adapting.store, "delete", refuse)
        refused(admin.delete("/v1/users/c"), 503, "disk")
    assert ask(admin, "c").status_code == 404 and admin.get("/v1/users/c").json()["source"] == "model"
    refused(admin.post("/v1/users/c/pairs", json=pairs(1)), 409, "user_of_the_model")
    assert admin.delete("/v1/users/c").status_code == 200 and admin.get("/v1/users/c").status_code == 404
    assert adapting.store.marked(["c"]) == ["c"]


@pytest.mark.parametrize("user", ["d", "y-2"])
def test_pairs_that_come_while_their_user_is_deleted_are_a_new_user_s(still, monkeypatch, user):
    """Behind the store's deletion, and before the table's."""
    admin, _, adapting = still
    if user != "d":
        admin.post(f"/v1/users/{user}/pairs", json=pairs(3))
    said, real = [], adapting._tell

    def meanwhile(*change):
        said.append((admin.get(f"/v1/users/{user}").status_code, admin.post(f"/v1/users/{user}/pairs", json=pairs(1))))
        return real(*change)

    monkeypatch.setattr(adapting, "_tell", meanwhile)
    assert admin.delete(f"/v1/users/{user}").status_code == 200
    ((status, posted),) = said
    assert (status, posted.status_code, posted.json()["pairs"]) == (404, 202, 1)
    assert admin.get(f"/v1/users/{user}").json()["source"] == "pairs"
    assert adapting.store.marked([user]) == ([user] if user == "d" else [])


def test_a_key_that_floods_leaves_places_to_the_others(still, monkeypatch):
    admin, shop, adapting = still
    for user in list(adapting.store.users):
        adapting.store.delete(user)
    monkeypatch.setattr(users, "WAITING", 8)
    flood = [shop.post(f"/v1/users/x-{number}/pairs", json=pairs(1)).status_code for number in range(9)]
    assert flood == [202] * 4 + [429] * 5
    others = [admin.post(f"/v1/users/y-{number}/pairs", json=pairs(1)).status_code for number in range(9)]
    assert others[0] == 202 and 429 in others and len(adapting.store.waiting) <= 8


@pytest.mark.parametrize("name", ["global_rm", "zero_shot", "icl"])
def test_a_model_without_users_vectors_says_so(name, lm_folder, tmp_path):
    """It tells whom it knows, by demonstrations here, and keeps nobody."""
    if name != "zero_shot":
        saved(method(name), config_of(name, lm_folder), tmp_path / name, lm_folder)
    own = str(tmp_path / name)
    engine = Engine(None, own) if name == "icl" else Engine(lm_folder, own if name == "global_rm" else None, backend="cpu")
    if name == "icl":
        engine.pair.model.demonstrations.of_user["ann"] = pairs(1)["pairs"]
    with serving.worker(engine) as worker:
        app = serving.make_app(worker, model="tiny", routers=[make_router(worker)])
        with serving.served(app) as address, httpx.Client(base_url=address) as client:
            for r in (client.post("/v1/users/x/pairs", json=pairs(1)), client.delete("/v1/users/x")):
                refused(r, 409, "no_user_vectors", "no users' vectors to adapt")
            told = client.get("/v1/users").json()
            known = ["ann"] if name == "icl" else []
            assert [(user["id"], user["source"]) for user in told["data"]] == [(user, "model") for user in known]
            assert told["keeps"] is False and client.get("/v1/users/ann").status_code == (200 if known else 404)
            refused(client.get("/v1/users/nobody"), 404, "user_not_found")


def test_without_a_file_the_model_s_users_are_told_and_none_comes(lm_folder, folder):
    with service(lm_folder, folder, None) as (client, _):
        told = client.get("/v1/users").json()
        assert client.get("/v1/users/a").json()["source"] == "model" and len(told["data"]) == 4 and told["keeps"] is False
        refused(client.post("/v1/users/x/pairs", json=pairs(1)), 409, "no_users_file", "--users FILE")
        refused(client.delete("/v1/users/a"), 409, "--users FILE")


def test_a_folder_that_was_written_while_it_was_loaded_is_refused(lm_folder, folder, tmp_path):
    """Else vectors would be another model's than the engine's."""
    with serving.worker(Engine(lm_folder, folder, backend="cpu")) as worker:
        with pytest.raises(PyargsError, match="was written while the model was loaded from it. Fix: start again"):
            open_users(tmp_path / "users.sqlite", worker, folder, model="another")
        assert not (tmp_path / "users.sqlite").exists()
        open_users(tmp_path / "users.sqlite", worker, folder, model=identity(Path(folder))).stop()


# -- the process -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(folder: str, policy: str, file: Path):
    """The process of `pyargs serve`, and a client of it."""
    words = ["serve", folder, "--policy", policy, "--port", "0", "--users", str(file)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-m", "pyargs.cli", *words], env=env, stderr=subprocess.PIPE, text=True)
    try:
        found = next(found for line in process.stderr if (found := re.search(r"at (http\S+)/v1", line)))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        with httpx.Client(base_url=found[1], timeout=1200) as client:
            yield process, client
    finally:
        process.kill()
        process.wait()


def children(pid: int) -> list[int]:
    return [int(one) for file in Path(f"/proc/{pid}/task").glob("*/children") for one in file.read_text().split()]


def test_kill_9_of_the_service_loses_no_answer_with_202(lm_folder, folder, tmp_path):
    """In the middle of an adaptation, whose process ends too. Users, pairs and deletions are there again, and jobs run."""
    file, rng, acknowledged = tmp_path / "users.sqlite", random.Random(0), {}
    with started(folder, lm_folder, file) as (process, client):
        for number in range(12):
            user = f"user-{rng.randrange(5)}"
            if rng.random() < 0.2 and user in acknowledged:
                assert client.delete(f"/v1/users/{user}").status_code == 200
                del acknowledged[user]
                continue
            told = client.post(f"/v1/users/{user}/pairs", json=pairs(rng.randrange(1, 3), f"red {number}"))
            assert told.status_code == 202
            acknowledged[user] = told.json()
        assert client.delete("/v1/users/b").status_code == 200
        others = children(process.pid)
    end = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in others):
        assert time.monotonic() < end, "what adapted has ended"
        time.sleep(0.05)
    with started(folder, lm_folder, file) as (process, client):
        listed = {user["id"]: user for user in client.get("/v1/users").json()["data"]}
        assert {user for user in listed if user.startswith("user-")} == acknowledged.keys() and "b" not in listed
        for user, job in acknowledged.items():
            assert listed[user]["pairs"] == job["pairs"] and done(client, job)["status"] == "done"
            body = {"model": "lore", "messages": serving.messages("tell"), "user": user, "max_tokens": 2, "reward_weight": 1.0}
            assert client.post("/v1/chat/completions", json=body).status_code == 200
