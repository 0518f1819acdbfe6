"""Users and their vectors: a table that grows and shrinks, and nobody else notices."""

from __future__ import annotations

import copy
import hashlib
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyargs.errors import PyargsError, UnknownUser
from pyargs.types import Users


def test_users():
    users = Users(["ann", "bob"], mixture=torch.zeros(2, 3))
    assert users.rows(["bob", "ann", "bob"]).tolist() == [1, 0, 1]
    with pytest.raises(UnknownUser, match="Did you mean: ann"):
        users.rows(["anna"])
    users.append(["cid"], mixture=torch.ones(1, 3))
    assert users.rows(["cid"]).tolist() == [2] and users.vectors["mixture"][2].tolist() == [1, 1, 1]
    for ids, vectors in [
        (["ann"], {"mixture": torch.zeros(1, 3)}),
        (["d", "d"], {"mixture": torch.zeros(2, 3)}),
        (["d"], {"mixture": torch.zeros(1, 4)}),
        (["d"], {"other": torch.zeros(1, 3)}),
    ]:
        with pytest.raises(PyargsError):
            users.append(ids, **vectors)
    with pytest.raises(PyargsError):
        Users(["a", "a"], mixture=torch.zeros(2, 3))
    with pytest.raises(PyargsError, match="'b' is there twice"):
        Users(["a", "b", "b"])
    assert Users().rows(["anyone"]).tolist() == [0]


SIZES = st.integers(1, 9)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(0, 9), st.data())
def test_a_table_without_some_of_its_users(size, adapted, data):
    """Every user keeps its vectors, the trained ones stay in front, and nothing is left of who is gone."""
    names = [f"u{i}" for i in range(size + adapted)]
    value = {name: i + 1.0 for i, name in enumerate(names)}
    gone = data.draw(st.lists(st.sampled_from(names), unique=True))

    def rows(some: list[str]) -> dict:
        found = torch.tensor([value[name] for name in some])
        return {"a": torch.stack([found * 0, found], dim=1), "b": found}

    table = Users(names[:size], **rows(names[:size]))
    table.append(names[size:], **rows(names[size:]))
    table.remove(gone)
    left = [name for name in names if name not in gone]
    assert sorted(table.ids) == sorted(left) and sorted(table.ids.values()) == list(range(len(left)))
    assert {name for name, row in table.ids.items() if row < table.trained} == set(left) & set(names[:size])
    for name in left:
        row = int(table.rows([name]))
        assert table.vectors["b"][row] == value[name] and table.vectors["a"][row].tolist() == [0, value[name]]
    for vector in table.vectors.values():
        memory = torch.empty(0).set_(vector.untyped_storage())
        assert not {value[name] for name in gone} & set(memory.tolist())
    table.append(gone, **rows(gone))
    assert len(table) == size + adapted and table.trained == len(set(left) & set(names[:size]))
    assert [table.vectors["b"][int(table.rows([name]))].item() for name in names] == list(value.values())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=20), st.integers(0, 99))
def test_a_table_is_the_same_saved_copied_or_elsewhere(changes, seed):
    """Users who come and go in a copy, in a loaded table, or after `to` leave the first one alone."""
    torch.manual_seed(seed)
    first = Users(["x", "y"], a=torch.randn(2, 3))
    table = first
    for change in changes:
        user = f"u{change}"
        if user in table.ids:
            table.remove([user])
        else:
            table.append([user], a=torch.randn(1, 3))
        if change == 0:
            with tempfile.TemporaryDirectory() as folder:
                table.save(folder)
                again = Users.load(folder)
        elif change < 3:
            again = copy.deepcopy(table) if change == 1 else copy.deepcopy(table).double().float()
        else:
            continue
        assert again.ids == table.ids and torch.equal(again.vectors["a"], table.vectors["a"])
        before = table.vectors["a"].detach().clone()
        again.append(["new"], a=torch.randn(1, 3))
        again.remove(["x"])
        again.append(["x"], a=torch.randn(1, 3))
        assert torch.equal(table.vectors["a"], before) and "new" not in table.ids


def test_many_users_come_and_go_at_the_cost_of_their_own_rows(monkeypatch):
    """The memory moves a few times in all; room that most users have left is given back."""
    table, places = Users(["0"], a=torch.zeros(1, 4)), set()
    for i in range(1, 2000):
        table.append([str(i)], a=torch.full((1, 4), float(i)))
        places.add(table.vectors["a"].data_ptr())
    assert len(places) < 25 and table.vectors["a"][:, 0].tolist() == list(range(2000))
    place = table.vectors["a"].data_ptr()
    for i in range(1000):
        table.remove([str(i)])
    assert table.vectors["a"].data_ptr() == place
    assert {user: table.vectors["a"][row, 0].item() for user, row in table.ids.items()} == {
        str(i): i for i in range(1000, 2000)
    }
    table.remove([str(i) for i in range(1000, 1990)])
    assert len(table) == 10 and table.vectors["a"].untyped_storage().nbytes() <= 4 * 10 * 16


def test_vectors_are_mapped_and_the_file_stays_as_it_was(tmp_path):
    size = 1 << 18
    Users([str(i) for i in range(size)], a=torch.ones(size, 8)).save(tmp_path)
    content = hashlib.sha256((tmp_path / "users.safetensors").read_bytes()).digest()
    table = Users.load(tmp_path)
    if Path("/proc/self/maps").exists():
        assert str(tmp_path / "users.safetensors") in Path("/proc/self/maps").read_text()
    table.remove(["0", "7"])
    table.vectors["a"].data.mul_(2)
    table.append(["new"], a=torch.zeros(1, 8))
    table.save(tmp_path / "changed")
    assert hashlib.sha256((tmp_path / "users.safetensors").read_bytes()).digest() == content
    assert Users.load(tmp_path / "changed").vectors["a"].sum() == 16 * (size - 2) and len(Users.load(tmp_path)) == size


def test_optimizers_go_on_after_users_came_and_went():
    table = Users(["a", "b"], v=torch.ones(2, 3))
    table.append(["c"], v=torch.ones(1, 3))
    table.remove(["a"])
    kept = torch.ones(1, 3) * table.vectors["v"][table.ids["b"]].detach()
    for kind, sparse in ((torch.optim.Adam, False), (torch.optim.SparseAdam, True)):
        optimizer = kind(list(table.parameters()), lr=0.1)
        torch.nn.functional.embedding(table.rows(["c"]), table.vectors["v"], sparse=sparse).sum().backward()
        optimizer.step()
        table.zero_grad()
    assert (table.vectors["v"][table.ids["c"]] < 0.85).all()
    assert torch.equal(table.vectors["v"][table.ids["b"]].detach(), kept[0])
    again = Users(list(table.ids), v=torch.zeros(2, 3))
    again.load_state_dict(table.state_dict())
    assert torch.equal(again.vectors["v"], table.vectors["v"])
