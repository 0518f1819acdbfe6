"""What was computed from a text, kept in the user's cache."""

from __future__ import annotations

import pytest

from pyargs.errors import PyargsError
from pyargs.store import Store


def test_a_store_that_cannot_be_used_says_so(tmp_path):
    (tmp_path / "kept.sqlite").write_bytes(b"this is no database, and longer than a header of one would be" * 20)
    with pytest.raises(PyargsError, match="kept.sqlite cannot be used.*PYARGS_CACHE"):
        Store(tmp_path / "kept.sqlite")
    (tmp_path / "file").write_text("")
    with pytest.raises(PyargsError, match="cannot be used"):
        Store(tmp_path / "file" / "kept.sqlite")


def test_store_keeps_many_and_replaces(tmp_path):
    texts = {f"text {i}": str(i).encode() for i in range(1203)}
    with Store(tmp_path / "sub" / "kept.sqlite") as store:
        store.put(texts)
        store.put({"text 7": b"other"})
    with Store(tmp_path / "sub" / "kept.sqlite") as store:
        found = store.get([*texts, "unknown", "text 7"])
    assert found == texts | {"text 7": b"other"}
