"""TL;DR from its comparisons: workers, splits, labels by length, published counts, other layouts, damage."""

from __future__ import annotations

import re

import pytest
from rows import SHARED, comparison, needs_shared, tldr_source, write

from pyargs import data, prepare
from pyargs.data import sources
from pyargs.errors import PyargsError
from pyargs.prepare import tldr


def test_tldr(tmp_path):
    out = tmp_path / "out"
    found = prepare.build("tldr", tldr_source(tmp_path / "source"), out, tldr.Config(support=4, embedder="none"))
    counts = found["counts"]
    assert counts["pairs of equal length (or with an empty summary) dropped"] == 4
    assert counts["train rows"] == 306 and counts["train rows kept"] == 303 and counts["rows without a post"] == 1
    assert counts["rows of the ten workers"] == 301 and counts["validation rows of the ten workers"] == 60
    dataset = data.load(out)
    splits = {split: data.of_split(dataset, split) for split in data.SPLITS}
    assert len(splits["train"]) == 270 and counts["pairs that PAL holds out of the train rows, not used"] == 30
    assert set(splits["train"]["user_id"]) == set(splits["train_test"]["user_id"]) == set(tldr.TRAIN_WORKERS)
    assert set(splits["query"]["user_id"]) == set(splits["support"]["user_id"]) == set(tldr.NEW_WORKERS)
    support = splits["support"]["user_id"][:]
    assert {user: support.count(user) for user in support} == dict.fromkeys(tldr.NEW_WORKERS, 4), "none has fewer"
    assert len(splits["query"]) == 31 * 2
    for r in dataset:
        longer = len(r["chosen"]) > len(r["rejected"])
        assert longer == (r["user_id"] not in tldr.SHORTER) == (r["user_type"] == "longer")
        assert r["prompt"].startswith(tldr.INSTRUCTION) and r["chosen"] == r["chosen"].strip()
    shorter = [*tldr.TRAIN_WORKERS[3:6], *tldr.NEW_WORKERS[22:]]  # methods.md 6.1
    assert tldr.SHORTER == set(shorter) and len(shorter) == 12 and not set(tldr.TRAIN_WORKERS) & set(tldr.NEW_WORKERS)
    assert found["check"]["problems"] == {}


def test_the_weight_of_tldr_is_chosen_on_the_seen_users_test_split(tmp_path):
    """Validation rows of the ten workers, which share no post with what was trained on (the paper's F.2)."""
    prepare.build("tldr", tldr_source(tmp_path / "source"), tmp_path / "out", tldr.Config(support=4, embedder="none"))
    dataset = data.load(tmp_path / "out")
    held, train = (data.of_split(dataset, split) for split in ("train_test", "train"))  # what `pyargs tune` reads is the first
    numbers = [int(re.search(r"Post (\d+) of", prompt)[1]) for prompt in held["prompt"]]
    assert len(held) == 60 and min(numbers) >= 100, "validation rows, see tldr_source"
    assert set(held["user_id"]) == set(train["user_id"]) and not set(held["prompt"]) & set(train["prompt"])
    assert not any((tmp_path / "out").glob("seen_test*")), "no split that nobody reads"


def test_tldr_splits_are_those_of_scikit_learn(tmp_path):
    """PAL: stratified 90/10 of the ten workers' rows, and 100 (here 4) of each new worker's, seed 42."""
    from sklearn.model_selection import train_test_split

    source = tldr_source(tmp_path / "source")
    rows = [r for name in ("batch3", "batch4") for _, r in sources.rows(source / "comparisons" / f"{name}.json")]
    rows = [r for r in rows if "sup2" in r["summaries"][0]["policy"] and r["info"]["post"]]
    rows = [r for r in rows if r["summaries"][0]["text"] != " same"]  # pairs without a label go first
    seen = [r for r in rows if r["split"] == "train" and r["worker"] in tldr.TRAIN_WORKERS]
    train, _ = train_test_split(seen, test_size=0.1, random_state=42, stratify=[r["worker"] for r in seen])
    prepare.build("tldr", source, tmp_path / "out", tldr.Config(support=4, embedder="none"))
    built = data.load(tmp_path / "out")
    expected = [tldr.INSTRUCTION + r["info"]["post"] for r in train]
    assert data.of_split(built, "train")["prompt"][:] == expected
    worker = tldr.NEW_WORKERS[5]
    own, _ = train_test_split(
        [r for r in rows if r["worker"] == worker and r["split"] != "train"], train_size=4, random_state=42
    )
    support = [r["prompt"] for r in data.of_split(built, "support") if r["user_id"] == worker]
    assert support == [tldr.INSTRUCTION + r["info"]["post"] for r in own]


def test_tldr_files_in_order_and_once(tmp_path):
    folder = tldr_source(tmp_path / "source") / "comparisons"
    (folder / "._batch3.json").write_bytes(b"\x00hidden")
    write(folder / "batch10.json", [comparison("somebody else")])
    found = tldr.build(str(folder.parent), tldr.Config(support=4))
    assert [path.name for path in found.sources] == ["batch3.json", "batch4.json", "batch10.json"]
    write(folder / "batch3.json.gz", [])
    with pytest.raises(PyargsError, match="batch3 is there in two forms"):
        tldr.build(str(folder.parent), tldr.Config())
    (folder / "batch3.json.gz").unlink()
    write(folder / "batch11.json", [comparison("somebody else")])
    found = prepare.build("tldr", folder.parent, tmp_path / "out", tldr.Config(support=4, embedder="none"))
    assert found["counts"]["rows that are there before (the same worker, post and summaries)"] >= 1
    assert any("Not the full source" in note for note in found["notes"])


@pytest.mark.parametrize("layout", ["list of structs", "struct of lists"])
def test_tldr_parquet(tmp_path, layout):
    import pyarrow
    import pyarrow.parquet

    source = tldr_source(tmp_path / "source")
    rows = [r for path in sorted((source / "comparisons").iterdir()) for _, r in sources.rows(path)]
    if layout == "struct of lists":
        for r in rows:
            r["summaries"] = {name: [s[name] for s in r["summaries"]] for name in ("text", "policy", "note")}
    (tmp_path / "hub" / "comparisons" / "train").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "hub" / "comparisons" / "train" / "0000.parquet")
    config = tldr.Config(support=4, embedder="none")
    one, two = (prepare.build("tldr", s, tmp_path / f"out-{s.name}", config) for s in (source, tmp_path / "hub"))
    assert one["statistics"]["sha256"] == two["statistics"]["sha256"] and one["counts"] == two["counts"]


def test_tldr_asserts_the_published_counts(tmp_path, monkeypatch):
    source, config = tldr_source(tmp_path / "source"), tldr.Config(support=4, embedder="none")
    monkeypatch.setattr(tldr, "FULL", {"train rows": 306, "validation rows": 249})
    with pytest.raises(PyargsError, match="303.*38487"):
        prepare.build("tldr", source, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
    known = {
        "train rows kept": 303,
        "validation rows kept": 249,
        "rows of the ten workers": 301,
        "validation rows of the ten workers": 60,
    }
    assert list(known) == list(tldr.EXPECTED)
    monkeypatch.setattr(tldr, "EXPECTED", known)
    prepare.build("tldr", source, tmp_path / "out", config)
    monkeypatch.setattr(tldr, "TRAIN_WORKERS", tldr.TRAIN_WORKERS[::-1])  # not the order by count
    with pytest.raises(PyargsError, match="another version"):
        prepare.build("tldr", source, tmp_path / "other", config)


def test_tldr_refuses(tmp_path):
    for rows, message in [
        ([{"info": {}}], r"a.json, line 1: not a comparison"),
        ([comparison("w", texts=(3, " x"))], "line 1: a summary's text or policy is not a string"),
        ([comparison("w", texts=("one",))], "line 1: not a comparison.*Leave it out"),
        ([comparison("w", post=["a"])], "line 1: the worker or the post is not a string"),
        ([comparison(["w"])], "line 1: the worker or the post is not a string"),
        ([comparison("w", split="test")], "line 1: not a comparison"),
        ([comparison("w")], "cannot be split 90/10"),
    ]:
        with pytest.raises(PyargsError, match=message):
            tldr.build(str(write(tmp_path / "a.json", rows)), tldr.Config())
    (tmp_path / "empty").mkdir()
    with pytest.raises(PyargsError, match="holds no .json"):
        tldr.build(str(tmp_path / "empty"), tldr.Config())
    with pytest.raises(PyargsError, match="6 validation pairs.*smaller --support"):
        tldr.build(str(tldr_source(tmp_path / "source")), tldr.Config(support=6))


@needs_shared
def test_tldr_in_the_original_layout(tmp_path):
    source = SHARED / "fixtures_synthetic" / "tldr"
    found = prepare.build("tldr", source, tmp_path / "out", tldr.Config(support=4, embedder="none"))
    kept = found["counts"]["train rows kept"] + found["counts"]["validation rows kept"]
    assert kept == 870 and found["counts"]["train rows"] + found["counts"]["validation rows"] - kept == 64
    assert found["statistics"]["users"] == 41 and found["check"]["problems"] == {}
