"""A preference file as a built set, labelled by simulated users beside or instead of the real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rows import row, write

from pyargs import data, prepare
from pyargs.errors import PyargsError
from pyargs.prepare import preferences


def pairs_file(folder: Path, train: int = 60, new: int = 30) -> Path:
    words = "I you we my your tremendously little cat observed running over seas".split()
    rng = np.random.default_rng(0)
    text = lambda: " ".join(rng.choice(words, rng.integers(3, 12))) + "."  # noqa: E731
    rows = [row(user=f"real{i % 5}", prompt=f"p{i}", chosen=text(), rejected=text() + " x") for i in range(train)]
    rows += [
        row(user=f"new{i % 3}", role=("support", "query")[i % 2], prompt=f"q{i}", chosen=text(), rejected=text() + " x")
        for i in range(new)
    ]
    return write(folder / "pairs.jsonl", rows)


def test_dense_overlap(tmp_path):
    config = preferences.Config(
        simulated_users=30, simulated_new_users=6, labels_per_pair=10, simulated_pairs=40, embedder="none"
    )
    found = prepare.build("preferences", pairs_file(tmp_path), tmp_path / "out", config)
    dataset = data.load(tmp_path / "out")
    train = data.of_split(dataset, "train", "train_test")
    labels = {}
    for r in train:
        labels.setdefault(r["pair_id"], []).append((r["user_id"], r["chosen"]))
    assert len(labels) == 40 and all(len({user for user, _ in several}) >= 9 for several in labels.values())
    assert len(train) <= 400 == 40 * config.labels_per_pair and set(dataset["user_id"]) <= {
        *(f"sim_{i:02d}" for i in range(30)),
        *(f"new_sim_{i}" for i in range(6)),
    }
    assert sum(len({chosen for _, chosen in several}) == 2 for several in labels.values()) > 20  # tastes differ
    support, query = (set(data.of_split(dataset, s)["pair_id"]) for s in ("support", "query"))
    assert support and query and not support & query and not (support | query) & set(labels)
    assert found["check"]["problems"] == {} and found["statistics"]["users_per_pair"]["mean"] > 6


def test_hybrid_keeps_the_real_users(tmp_path):
    source = pairs_file(tmp_path)
    config = preferences.Config(simulated_users=12, labels_per_pair=5, hybrid=True, embedder="none")
    prepare.build("preferences", source, tmp_path / "out", config)
    dataset = data.load(tmp_path / "out")
    real = [r for r in dataset if not r["user_id"].startswith("sim")]
    plain = {(r["user_id"], r["prompt"], r["chosen"], r["rejected"]) for r in data.load(source)}
    assert {(r["user_id"], r["prompt"], r["chosen"], r["rejected"]) for r in real} == plain
    sides = [set(data.of_split(dataset, s)["prompt"]) for s in ("train", "train_test")]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    built = preferences.Config(simulated_users=12, labels_per_pair=5, hybrid=True, embedder="none")
    prepare.build("preferences", tmp_path / "out", tmp_path / "again", built)  # over a set with its own train_test
    again = data.load(tmp_path / "again")
    sides = [set(data.of_split(again, s)["prompt"]) for s in ("train", "train_test")]
    assert not sides[0] & sides[1] and any(u.startswith("sim") for u in data.of_split(again, "train_test")["user_id"])
    with pytest.raises(PyargsError, match="no rows of support or query"):
        rows = write(tmp_path / "train.jsonl", [row(prompt=f"p{i}") for i in range(5)])
        prepare.build("preferences", rows, tmp_path / "x", preferences.Config(simulated_new_users=3, embedder="none"))
