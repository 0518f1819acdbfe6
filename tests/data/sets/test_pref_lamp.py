"""LaMP-5: its papers and pairs, and other data refused by name."""

from __future__ import annotations

import pytest
from rows import CI, SHARED, lamp, needs_shared, write

from pyargs import data
from pyargs.data.sets import pref_lamp as lamp_files
from pyargs.errors import PyargsError


@pytest.mark.parametrize("gz", [False, True])
def test_lamp_items(tmp_path, gz):
    found = lamp_files.items(lamp(tmp_path, gz=gz))
    assert found["item_id"][:] == ["10", "1", "20", "2", "30", "3"]
    assert found["title"][:] == [f"Title {item}" for item in found["item_id"]]
    assert found["user_split"][:] == ["train"] * 4 + ["adapt"] * 2
    assert found[0]["prompt"] == "Generate a title for the following abstract of a paper: About 10."
    assert (found[0]["date"], found[0]["role"], found[1]["date"], found[1]["role"]) == ("2010", "profile", None, "question")


def test_lamp_pairs_are_checked_against_the_papers(tmp_path):
    def pair(item: str, role: str, **changes) -> dict:
        text = {"prompt": f"{lamp_files.INSTRUCTION}About {item}.", "chosen": f"Title {item}", "rejected": "Other"}
        return {"user": item[0], "role": role, "pair_id": item} | text | changes

    folder = lamp(tmp_path)
    with pytest.raises(PyargsError, match="found preference files none.*pyargs data build"):
        lamp_files.load(folder)
    prefs = write(folder / "prefs.jsonl", [pair("10", "train"), pair("1", "train"), pair("30", "support"), pair("3", "query")])
    assert lamp_files.load(folder)["split"][:] == data.load("pref_lamp", prefs)["split"][:]
    write(prefs, [pair("10", "train", chosen="Not the title")])
    with pytest.raises(PyargsError, match="pair 10 does not match"):
        lamp_files.load(folder)


@needs_shared
def test_real_titles():
    pairs, papers = data.load("pref_lamp", CI), lamp_files.items(CI)
    assert len(papers) == len(pairs) == 1291 and papers.filter(lambda p: p["role"] == "question").num_rows == 40
    counts = {split: pairs["split"][:].count(split) for split in data.SPLITS}
    assert counts["train"] + counts["train_test"] == 960 and counts["support"] + counts["query"] == 331
    assert abs(counts["train_test"] - 30 * 6) <= 3 and len(set(pairs["user_id"])) == 40


@needs_shared
def test_items_of_the_full_set():
    papers = lamp_files.items(SHARED / "pref_lamp_like")
    kinds, users = papers["user_split"][:], papers["user_id"][:]
    assert (kinds.count("train"), kinds.count("adapt")) == (24111, 6247)
    assert len({u for u, k in zip(users, kinds, strict=True) if k == "train"}) == 485 and len(set(users)) == 611
