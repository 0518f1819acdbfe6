"""Keys: only their hashes are kept, and what a key is not for looks as if it were not there."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyargs import cli
from pyargs.errors import FEW, PyargsError, did_you_mean
from pyargs.serve.keys import Key, Keys, new


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys.json"


def test_a_key_is_found_by_its_text_which_the_file_does_not_hold(file):
    ops, shop = new(file, "ops", admin=True), new(file, "shop", users=["ann", "shop-*"])
    keys = Keys(file)
    assert (keys.find(ops).name, keys.find(shop).name, keys.find(ops).admin) == ("ops", "shop", True)
    assert ops not in file.read_text() and shop[7:] not in file.read_text()
    changed = ops[:-1] + ("a" if ops[-1] != "a" else "b")
    for other in ("", ops[:-1], ops + "x", changed, ops + "\n", json.loads(file.read_text())["ops"]["sha256"]):
        assert keys.find(other) is None


def test_a_key_is_for_its_users_alone(file):
    token, admin = new(file, "shop", users=["ann", "shop-*"]), new(file, "ops", admin=True)
    key = Keys(file).find(token)
    assert [user for user in ("ann", "anna", "an", "shop-", "shop-1", "shop", "") if key.may(user)] == [
        "ann",
        "shop-",
        "shop-1",
    ]
    assert list(key.among(["bob", "shop-2", "ann"])) == ["shop-2", "ann"] and len(key.among(["bob", "ann"])) == 1
    assert Keys(file).find(admin).may("anybody")


users = st.lists(st.text("abc*", min_size=1, max_size=3), max_size=8, unique=True)


@given(users=users, ids=users, beginnings=users)
def test_among_is_what_the_key_may_see(users, ids, beginnings):
    key = Key("k", b"", False, frozenset(ids), tuple(beginnings))
    seen = [user for user in users if user in ids or any(user.startswith(one) for one in beginnings)]
    among = key.among(users)
    assert list(among) == seen and len(among) == len(seen) and all((user in among) == (user in seen) for user in users)
    assert Key("k", b"", True).among(users) == users


@pytest.mark.parametrize("more", [0, FEW])
def test_near_names_are_among_those_that_the_key_may_see(more):
    """Of few users and of many, which are looked up in another way."""
    users = dict.fromkeys(("shop-ann", "shop-anne", "home-ann", *(f"filler {i}" for i in range(more))), 0)
    key = Key("k", b"", False, beginnings=("shop-",))
    said = did_you_mean("shop-an", key.among(users))
    assert "shop-ann" in said and "home" not in did_you_mean("home-an", key.among(users))


@pytest.mark.parametrize(
    "content, why",
    [
        ({}, "holds no keys. Fix: pyargs key"),
        (["a"], "holds no keys"),
        ({"a": "text"}, "key 'a': it has sha256, and admin or users"),
        ({"a": {"sha256": "0" * 64, "admin": True, "key": "x"}}, "no 'key'"),
        ({"a": {"admin": True}}, "'sha256' is missing"),
        ({"a": {"sha256": "0" * 63, "admin": True}}, "64 digits"),
        ({"a": {"sha256": "0" * 64}}, "either an admin's"),
        ({"a": {"sha256": "0" * 64, "admin": False}}, "either an admin's"),
        ({"a": {"sha256": "0" * 64, "admin": True, "users": ["b"]}}, "either an admin's"),
        ({"a": {"sha256": "0" * 64, "admin": "yes"}}, "'admin' must be bool"),
        ({"a": {"sha256": "0" * 64, "users": "b"}}, "'users' must be"),
        ({"a": {"sha256": "0" * 64, "users": ["b", "*"]}}, "'\\*' is no user"),
        (
            {"a": {"sha256": "0" * 64, "admin": True}, "b": {"sha256": "0" * 64, "users": ["c"]}},
            "'a' and 'b' are the same key",
        ),
    ],
)
def test_what_is_no_file_of_keys_is_refused(file, content, why):
    file.write_text(json.dumps(content))
    with pytest.raises(PyargsError, match=why):
        Keys(file)


def test_a_name_is_given_once_and_a_refused_key_leaves_the_file(file):
    new(file, "ops", admin=True)
    before = file.read_text()
    for more in (
        dict(name="ops", admin=True),
        dict(name="b"),
        dict(name="b", users=[""]),
        dict(name="b", admin=True, users=["c"]),
    ):
        with pytest.raises(PyargsError):
            new(file, more.pop("name"), **more)
    assert file.read_text() == before


def test_the_command_makes_a_key(file, capsys):
    assert cli.main(["key", str(file), "shop", "--users", "ann", "shop-*"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["name"] == "shop" and re.fullmatch(r"pyargs-[\w-]{43}", made["key"])
    assert Keys(file).find(made["key"]).may("shop-3")
    assert cli.main(["key", str(file), "shop", "--admin"]) == 1 and "has a key 'shop' already" in capsys.readouterr().err
