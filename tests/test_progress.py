"""Bars for who watches, and silence in files."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from pyargs import cli, progress

ROOT = Path(__file__).resolve().parent.parent


class Screen:
    def __init__(self, terminal: bool):
        self.terminal, self.text = terminal, ""

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


@pytest.mark.parametrize(("terminal", "hide", "shown"), [(True, False, True), (False, False, False), (True, True, False)])
def test_a_bar_is_for_a_terminal(monkeypatch, terminal, hide, shown):
    monkeypatch.setattr(sys, "stderr", Screen(terminal))
    monkeypatch.setattr("tqdm.auto.tqdm", lambda iterable, **more: more)
    assert progress.progress_bar(range(3), desc="train", hide=hide).get("disable", False) is not shown


def test_a_redirected_bar_says_nothing(monkeypatch):
    screen = Screen(False)
    monkeypatch.setattr(sys, "stderr", screen)
    with progress.progress_bar(range(3), desc="train") as bar:
        for _ in bar:
            bar.set_postfix(loss="1")
    assert screen.text == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_the_command_line_quiets_the_bars_of_others(monkeypatch, terminal, capsys):
    """Where it is set before tqdm is imported, which `pyargs` does itself only later."""
    monkeypatch.setattr(os, "environ", {"HOME": "x"})
    monkeypatch.setattr(sys, "stderr", Screen(terminal))
    assert cli.main(["--version"]) == 0
    assert os.environ.get("TQDM_DISABLE") == (None if terminal else "1")
    os.environ["TQDM_DISABLE"] = ""  # somebody's own wish
    cli.main(["--version"])
    assert os.environ["TQDM_DISABLE"] == ""


def test_the_command_line_imports_no_tqdm_before():
    import subprocess

    code = "import sys, pyargs.cli; sys.exit('tqdm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0


def test_all_bars_are_this_one():
    files = [*(ROOT / "pyargs").rglob("*.py"), ROOT / "experiments" / "reproduce.py"]
    own = [file.name for file in files if re.search(r"(from|import) tqdm", file.read_text(encoding="utf-8"))]
    assert own == ["progress.py"]
