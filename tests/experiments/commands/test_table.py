"""`python -m experiments table` prints a table or writes it."""

from __future__ import annotations

import json

from cells import printed

from experiments.__main__ import main


def test_the_command_prints_or_writes(folder, tmp_path, capsys):
    text = printed(4, "--results", folder, capsys=capsys)
    assert text.startswith("**Table 4.") and "± " in text
    assert main(["table", "4", "--results", str(folder), "--out", str(tmp_path / "a/4.md")]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "table": "4",
        "out": str(tmp_path / "a/4.md"),
        "profile": "cpu",
        "missing": [],
    }
    assert (tmp_path / "a/4.md").read_text(encoding="utf-8") == text
