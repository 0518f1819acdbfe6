"""The smoke script: paths are the caller's."""

from __future__ import annotations

import os
import subprocess

import pytest
from cells import EXPERIMENTS

SMOKE = EXPERIMENTS / "smoke.sh"


NOTES_ITS_CALLS = """#!/usr/bin/env bash
echo "$PWD $*" >> "{log}"
echo '"run_now": 0'
"""


@pytest.mark.parametrize("place", ["bin/python", "./bin/python", "python"])
def test_relative_paths_are_the_callers(tmp_path, place):
    """A stand-in for Python notes how it is called, from a folder with a space in its name."""
    here = tmp_path / "some where"
    python = here / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(NOTES_ITS_CALLS.format(log=tmp_path / "log"))
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": place, "PATH": f"{python.parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", str(SMOKE), "out"], cwd=here, env=environment, check=True, capture_output=True)
    calls = (tmp_path / "log").read_text().splitlines()
    assert f"-m experiments reproduce smoke --work {here}/out/work --results {here}/out/results" in calls[0]
    assert len(calls) > 8 and all(f"{here}/out" in call for call in calls)
    assert (here / "out" / "grid.json").exists()
