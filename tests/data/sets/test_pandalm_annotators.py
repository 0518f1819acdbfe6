"""A new user must be an annotator who is there."""

from __future__ import annotations

import pytest
from rows import row, write

from pyargs import data
from pyargs.errors import PyargsError


def test_pandalm_needs_a_known_annotator(tmp_path):
    rows = [row(user=f"annotator{i % 3}", role="all", prompt=f"p{i // 3}") for i in range(60)]
    path = write(tmp_path / "prefs.jsonl", rows)
    with pytest.raises(PyargsError, match="No annotator 'annotator7'. Did you mean"):
        data.load("pandalm_annotators", path, new_user="annotator7")
    dataset = data.load("pandalm_annotators", path, new_user="annotator1")
    new = {r["prompt"] for r in dataset if r["user_id"] == "annotator1"}
    assert new and not new & {r["prompt"] for r in dataset if r["user_id"] != "annotator1"}
