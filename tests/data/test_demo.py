"""The embedded set: its attributes, and pairs that follow them."""

from __future__ import annotations

import pytest

from pyargs import data
from pyargs.data import demo
from pyargs.errors import PyargsError


def test_attributes():
    text = "I don't know, my friend. You can, and WE’LL see your cat: 42 times!"
    assert demo.attribute("first_person", text) == pytest.approx(100 * 3 / 13)
    assert demo.attribute("second_person", text) == pytest.approx(100 * 2 / 13)
    assert demo.attribute("sentence_length", text) == 6.5
    assert demo.attribute("sentence_length", "One two three\nfour") == 2
    assert demo.attribute("word_length", "I don't see café") == pytest.approx((1 + 4 + 3 + 4) / 4)
    for name in demo.ATTRIBUTES:
        assert demo.attribute(name, "") == demo.attribute(name, "... 42") == 0
    with pytest.raises(PyargsError, match="Did you mean: word_length"):
        demo.attribute("word_lenght", text)


def test_demo_set():
    lines = demo.prompts()
    assert len(lines) == len(set(lines)) == 160 and sum(len(demo.prompts(split)) for split in demo.RANGES) == 160
    assert len(demo.answers()) == 160 and all(len(set(four)) == 4 for four in demo.answers())
    dataset = data.load("demo")
    assert set(dataset["user_id"]) == set(demo.users())
    split_of = {line: split for split in demo.RANGES for line in demo.prompts(split)}
    pairs = {}
    for r in dataset:
        name, sign = demo.users()[r["user_id"]]
        assert r["split"] == split_of[r["prompt"]] and r["attribute"] == f"{'+' if sign > 0 else '-'}{name}"
        gap = sign * (demo.attribute(name, r["chosen"]) - demo.attribute(name, r["rejected"]))
        assert gap >= demo.ATTRIBUTES[name][1]
        assert pairs.setdefault(r["pair_id"], {r["chosen"], r["rejected"]}) == {r["chosen"], r["rejected"]}
    for user in demo.users("new"):
        counts = [r["split"] for r in dataset if r["user_id"] == user]
        assert counts.count("support") >= 8 and counts.count("query") >= 15
    assert not set(demo.users("new")) & set(demo.users("train"))
    assert sum(path.stat().st_size for path in demo.FOLDER.iterdir()) < 1_000_000
    assert len(data.load("demo", max_pairs=5)) <= 5 * 2 * len(demo.users())
