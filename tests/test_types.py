"""Users and their vectors: a table that grows and shrinks, and nobody else notices."""

from __future__ import annotations

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
    assert Users().rows(["anyone"]).tolist() == [0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.data())
def test_a_table_without_some_of_its_users(size, data):
    names = [f"u{i}" for i in range(size)]
    gone = data.draw(st.lists(st.sampled_from(names), unique=True))
    table = Users(names, a=torch.arange(size * 2.0).view(size, 2), b=torch.arange(float(size)))
    table.remove(gone)
    assert list(table.ids) == [name for name in names if name not in gone]
    for name in table.ids:
        row = int(table.rows([name]))
        assert table.vectors["b"][row] == names.index(name) and table.vectors["a"][row, 1] == 2 * names.index(name) + 1
    table.append(gone, a=torch.zeros(len(gone), 2), b=torch.zeros(len(gone)))
    assert len(table) == size
