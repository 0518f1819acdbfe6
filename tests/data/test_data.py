"""Data sets by name, or by what is none."""

from __future__ import annotations

import pytest
from rows import row, write

from pyargs import data, prepare
from pyargs.errors import PyargsError


def test_load_by_name(tmp_path):
    assert {"demo", "synthetic", "preferences", "pref_lamp", "hh_rlhf_users"} <= set(data.names())
    assert prepare.names() == ["pref_lamp", "preferences", "prism", "tldr"]
    for call, message in [
        (lambda: data.load("dmeo"), "No data set and no file 'dmeo'. Did you mean: demo"),
        (lambda: data.load("pref_lamp"), "needs a source"),
        (lambda: data.load("demo", "somewhere"), "takes no source"),
        (lambda: data.load("synthetic", usres=3), "no option 'usres'. Did you mean: users"),
        (lambda: data.load(write(tmp_path / "a.jsonl", [row()]), "other"), "is a file or folder already"),
        (lambda: data.load("tldr", tmp_path), "pyargs data build tldr"),
        (lambda: prepare.build("demo", tmp_path, tmp_path / "out"), "'demo' is not built"),
    ]:
        with pytest.raises(PyargsError, match=message):
            call()
