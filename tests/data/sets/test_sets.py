"""The published sets as they lie in the data pack."""

from __future__ import annotations

import pytest
from rows import SHARED, needs_shared

from pyargs import data
from pyargs.prepare import check


@needs_shared
@pytest.mark.parametrize(
    ("name", "options", "pairs", "splits"),
    [
        ("hh_rlhf_users", {}, 6100, {"train": 10, "train_test": 10, "support": 31, "query": 31}),
        ("hh_rlhf_users", {"users": "two_types"}, 3198, {"train": 40, "train_test": 40, "support": 20, "query": 20}),
        ("persona_statements", {}, 4800, {"train": 60, "train_test": 60, "support": 20, "query": 20}),
        ("pandalm_annotators", {}, 2489, {"train": 3, "train_test": 3}),
        ("pandalm_annotators", {"new_user": "annotator1"}, None, {"train": 2, "train_test": 2, "support": 1, "query": 1}),
    ],
)
def test_other_real_sets(name, options, pairs, splits):
    dataset = data.load(name, SHARED / name, **options)
    assert pairs is None or len(dataset) == pairs
    found = {s: set(data.of_split(dataset, s)["user_id"]) for s in data.SPLITS}
    assert {s: len(users) for s, users in found.items() if users} == splits
    chat = [r["prompt"] for r in dataset if isinstance(r["prompt"], list)]
    assert all(p[-1]["role"] == "user" and all(a["role"] != b["role"] for a, b in zip(p, p[1:], strict=False)) for p in chat)
    assert bool(chat) == (name == "hh_rlhf_users")
    told = check.report(((str(i), r) for i, r in enumerate(dataset)), embedder=None)
    assert told["problems"] == {}
