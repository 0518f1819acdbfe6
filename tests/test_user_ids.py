"""Ids of users, wherever they are taken: text, or integers as their digits; never the letters of one id."""

from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from conftest import reward_model, tiny_lm
from hypothesis import given, settings
from hypothesis import strategies as st

import pyargs
from pyargs.decode.engine import Engine
from pyargs.errors import PyargsError, UnknownUser
from pyargs.models.demonstrations import Demonstrations
from pyargs.models.token_reward import TokenReward
from pyargs.types import Users
from pyargs.user_ids import UserRows, user_ids

IDS = torch.tensor([[5, 6, 7]])


@pytest.fixture(scope="module")
def models():
    lm = tiny_lm(seed=3)
    return tiny_lm(), reward_model(lm, users=("7", "bob", "a")), TokenReward(lm, None)


ONE = dict(max_new_tokens=1)
CALLS = {
    "generate": lambda lm, reward, _, users: Engine(lm, reward).generate(IDS.tolist(), users, reward_weight=1.0, **ONE),
    "token reward": lambda lm, _, reward, users: Engine(lm, reward).generate(IDS.tolist(), users, reward_weight=1.0, **ONE),
    "best of n": lambda lm, reward, _, users: Engine(lm, reward, best_of=1).generate(IDS.tolist(), users, **ONE),
    "custom_generate": lambda lm, reward, _, users: lm.generate(
        IDS, max_new_tokens=1, custom_generate=pyargs.guide(reward, users=users, reward_weight=1.0)
    ),
    "score": lambda lm, reward, _, users: reward.score([([5], [[6]])], users),
    "rows": lambda lm, reward, _, users: reward.users.rows(users),
}


NOBODY = {"generate", "token reward", "best of n", "custom_generate"}
"""Calls in which None says that the model is the same for everyone."""


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("users", ["a", "bob", 7, b"a", None, np.array("a"), torch.tensor(7)])
def test_one_id_in_the_place_of_a_list_is_refused(models, call, users):
    if users is None and call in NOBODY:
        assert call == "token reward" or pytest.raises(UnknownUser, CALLS[call], *models, users)
        return
    with pytest.raises(PyargsError, match=r"users is a list with one id for each row, got .*: write \["):
        CALLS[call](*models, users)


@pytest.mark.parametrize("call", CALLS)
def test_a_set_has_no_order(models, call):
    """Which row were whose is decided by the hashes of the process."""
    for users in ({"a"}, frozenset(["a"])):
        with pytest.raises(PyargsError, match="a set, which has no order"):
            CALLS[call](*models, users)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("user", ["7", 7, np.int64(7)])
def test_an_integer_is_its_digits(models, call, user):
    assert CALLS[call](*models, [user]) is not None


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("user", [7.0, True, None, ["a"]])
def test_other_ids_are_refused(models, call, user):
    with pytest.raises(PyargsError, match="a user id is a str, or an integer, got"):
        CALLS[call](*models, [user])


def test_tables_and_demonstrations_hold_text(tmp_path):
    users = Users([3, "b"], v=torch.zeros(2, 1))
    users.append([np.int64(4)], v=torch.ones(1, 1))
    assert list(users.ids) == ["3", "b", "4"] and users.rows(["4", 3]).tolist() == [2, 0]
    with pytest.raises(PyargsError, match="'3' is there already"):
        users.append([3], v=torch.ones(1, 1))
    with pytest.raises(PyargsError, match="is a list"):
        Users("anna")
    how = {"retrieve": "random", "show": "pair", "content_tokens": 9, "instruction": "", "max_tokens": 99, "seed": 0}
    shown = Demonstrations(shots=1, of_user={"3": [{"prompt": "p", "chosen": "c", "rejected": "r"}]}, **how)
    assert shown.choose("q", 3) == shown.choose("q", "3")


def test_prompts_and_users_are_as_many(models):
    engine = Engine(*models[:2])
    with pytest.raises(PyargsError, match="2 prompts but 1 users"):
        engine.generate([[5], [6]], ["bob"], reward_weight=1.0)
    with pytest.raises(PyargsError, match="is a list"):
        engine.generate([[5], [6], [7]], "bob", reward_weight=1.0)
    assert user_ids(iter(["a"])) == ["a"]


def test_a_dataset_of_ones_own_may_have_integer_ids(tmp_path):
    from datasets import Dataset

    from pyargs.data import synthetic
    from pyargs.methods import icl

    backbone = str(synthetic.tiny_lm(tmp_path / "lm"))
    pairs = [("train", user, i) for user in (1, 2) for i in range(4)] + [("support", 3, i) for i in range(3)]
    columns = {"prompt": "p{}", "chosen": "good {}", "rejected": "bad {}"}
    rows = [{"user_id": u, "split": s} | {name: text.format(i) for name, text in columns.items()} for s, u, i in pairs]
    model = pyargs.train("icl", Dataset.from_list(rows), icl.Config(backbone=backbone, shots=1))
    assert pyargs.adapt(model, Dataset.from_list(rows)) == ["3"]
    assert "3" in model.known_users and 3 not in model.known_users
    assert model.prompt_ids("q", 3) == model.prompt_ids("q", "3")


class Rare(str):
    """An id with one of two hashes, so that many have the same."""

    def __hash__(self) -> int:
        return len(self) % 2 + (ord(self[-1]) << 40)

    __eq__ = str.__eq__


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([str, Rare]), st.lists(st.text("abcä", min_size=1, max_size=3), unique=True), st.data())
def test_rows_of_users_are_those_of_a_dict(kind, names, data):
    """With ids that come, go, move to another's place and are looked up in any order."""
    names = [kind(name) for name in names]
    rows = UserRows(names)
    for _ in range(data.draw(st.integers(0, 8))):
        if rows and data.draw(st.booleans()):
            gone, looked_up = (data.draw(st.sampled_from(list(rows))) for _ in range(2))
            assert rows.ids[rows[looked_up]] == looked_up
            if rows[gone] < len(rows) - 1:
                rows.move(len(rows) - 1, rows[gone])
            rows.cut(len(rows) - 1)
            assert gone not in rows
        else:
            new = kind(data.draw(st.text("abcä", min_size=1, max_size=4)))
            if new not in rows:
                rows.append([new])
        expected = {name: row for row, name in enumerate(rows.ids)}
        for again in (rows, copy.deepcopy(rows), pickle.loads(pickle.dumps(rows))):
            assert dict(again) == expected and list(again) == list(expected) and len(again) == len(expected)
        assert not [name for name in names if (name in rows) != (name in expected)] and 3 not in rows
    if rows:
        with pytest.raises(PyargsError, match="is there twice"):
            UserRows([*rows, data.draw(st.sampled_from(list(rows)))])


def test_a_look_up_notes_no_row_that_was_moved_meanwhile(monkeypatch):
    """Else somebody who was removed would be known for good, in the row of another."""
    rows, looked, go_on = UserRows(["ann", "bob", "cid"]), threading.Event(), threading.Event()
    inner = UserRows._look_up

    def slowly(self, user):
        row = inner(self, user)
        looked.set()
        go_on.wait(0.2)
        return row

    def remove() -> None:
        looked.wait()
        rows.move(2, 0)
        rows.cut(2)
        go_on.set()

    monkeypatch.setattr(UserRows, "_look_up", slowly)
    other = threading.Thread(target=remove)
    other.start()
    rows.get("ann")
    other.join()
    assert "ann" not in rows and rows["cid"] == 0
