"""Preference files: every format is read, what is damaged is refused by its row."""

from __future__ import annotations

import gzip
import json

import pytest
from rows import row, said, write

from pyargs import data
from pyargs.data import preferences
from pyargs.errors import PyargsError


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_reads_every_format(tmp_path, name):
    rows = [row(prompt=f"p{i}", pair_id=f"x{i}") for i in range(10)] + [
        row(user="u2", split="adapt", role=role, prompt="q", pair_id=f"y{role}") for role in ("support", "query")
    ]
    if name.endswith("parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
    else:
        write(tmp_path / name, rows)
    dataset = data.load(tmp_path / name)
    assert tuple(dataset.column_names) == data.COLUMNS
    assert dataset["user_id"][:] == ["u1"] * 10 + ["u2"] * 2
    assert sorted(dataset["split"]) == ["query", "support"] + ["train"] * 8 + ["train_test"] * 2
    assert data.content_hash(dataset) == data.content_hash(data.load("preferences", str(tmp_path / name)))


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        (said("a", "good"), said("b", "bad"), "a.jsonl, line 2: no prompt, and"),
        (said("a", "good"), said("a", "good"), "line 2: chosen and rejected are the same"),
        (said("a", "good", "more", "yes"), said("a", "bad"), "line 2: chosen must be a string or a list of one assistant"),
        (said("a", "good"), said("a"), "line 2: rejected must be"),
        (said("a", "good"), "bad", "line 2: no column 'prompt'"),
    ],
)
def test_other_implicit_prompts_are_refused_by_row(tmp_path, chosen, rejected, message):
    first = row(prompt=..., chosen=said("a", "good"), rejected=said("a", "bad"))
    write(tmp_path / "a.jsonl", [first, row(prompt=..., chosen=chosen, rejected=rejected)])
    with pytest.raises(PyargsError, match=message):
        preferences.load(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_json_array(tmp_path, name):

    def save(text: str):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())

    save("\n " + json.dumps([row(user=7, pair_id=3, prompt=f"p{i}") for i in range(3)], indent=1))
    found = preferences.load(tmp_path / name)
    assert found["user_id"][:] == ["7"] * 3 and found["pair_id"][:] == ["3"] * 3
    save(json.dumps([row(), 7]))
    with pytest.raises(PyargsError, match=f"{name}, row 2: not a JSON object"):
        preferences.load(tmp_path / name)
    save(json.dumps([row()])[:-1])
    with pytest.raises(PyargsError, match="damaged or not JSON"):
        preferences.load(tmp_path / name)
    save(json.dumps(row()) + "\n" + json.dumps(row(prompt="q")))  # one object a line, as before
    assert len(preferences.load(tmp_path / name)) == 2


def test_damaged_files(tmp_path):
    whole = write(tmp_path / "a.jsonl.gz", [row(prompt=f"p{i}") for i in range(500)]).read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    (tmp_path / "plain.jsonl.gz").write_text("{}")
    (tmp_path / "bad.jsonl").write_text(json.dumps(row()) + "\n{oops\n")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "a.csv").write_text("x")
    for name, message in {
        "cut.jsonl.gz": "damaged",
        "plain.jsonl.gz": "damaged",
        "bad.jsonl": "line 2: not JSON",
        "list.jsonl": "line 1: not a JSON object",
        "a.csv": "is .jsonl, .json",
        "none.jsonl": "No file",
    }.items():
        with pytest.raises(PyargsError, match=message):
            preferences.load(tmp_path / name)


def test_parquet_with_bytes_that_are_no_text(tmp_path):
    import pyarrow
    import pyarrow.parquet

    def save(name, **columns):
        table = pyarrow.table({**{k: [v] for k, v in row().items()}, **columns})
        pyarrow.parquet.write_table(table, tmp_path / name)
        return tmp_path / name

    bad = pyarrow.array([b"\xff\xfe"], pyarrow.binary()).view(pyarrow.utf8())
    with pytest.raises(PyargsError, match=r"bad\.parquet is damaged"):
        preferences.load(save("bad.parquet", prompt=bad))
    with pytest.raises(PyargsError, match="prompt is bytes"):
        preferences.load(save("bytes.parquet", prompt=pyarrow.array([b"x"], pyarrow.binary())))
    table = pyarrow.table([["a"], ["b"]], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(PyargsError, match="'prompt' stands twice"):
        preferences.load(tmp_path / "twice.parquet")
