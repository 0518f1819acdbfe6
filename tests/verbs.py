"""Calls of the command line: in a process of its own, or in this one."""

from __future__ import annotations

import json
import subprocess
import sys

from pyargs import cli


def run(*words: str, expect: int = 0):
    done = subprocess.run([sys.executable, "-m", "pyargs.cli", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == expect, done.stderr
    return done


def call(capsys, words: list[str], expect: int = 0) -> dict:
    assert cli.main(words) == expect
    out = capsys.readouterr()
    return json.loads(out.out) if expect == 0 else out.err
