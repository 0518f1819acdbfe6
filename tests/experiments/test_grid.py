"""The run of the grid: a killed worker is replaced, and workers end with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from cells import ROOT


def wait_for(what, seconds: float = 240):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.05)
    return found


GRID = """
import os, signal, sys, time
from pathlib import Path

from experiments import profiles, reproduce
from experiments.__main__ import main


def blind(cell, places):
    {what}
    return {{"accuracy": 50.0}}


# In the workers, too, which run this file again: nothing is computed, and nothing imported for it.
reproduce.blind, reproduce.dataset_hash = blind, lambda words: "none"
sets = profiles.PROFILES["smoke"]["sets"]
sets["another"] = sets["synthetic"]
if __name__ == "__main__":
    sys.exit(main(["reproduce", "smoke", "--only", "word overlap", "--work", "work", "--results", "results"]))
"""
KILLED_ONCE = """if not Path("killed").exists():
        Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)"""
AT_WORK = """Path(f"{os.getpid()}.works").touch(), time.sleep(600)"""


def begun(folder: Path, what: str):
    """A grid of two cells, in a process of its own with two workers; `what` is done in each cell."""
    (folder / "grid.py").write_text(GRID.format(what=what))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "grid.py"], cwd=folder, env=environment, **pipes)


def test_a_killed_worker_is_replaced(tmp_path):
    """Killed within a cell; what it or the other had in hand is done by those that come after."""
    grid = begun(tmp_path, KILLED_ONCE)
    out, err = grid.communicate(timeout=400)
    assert grid.returncode == 0, err[-2000:]
    assert (tmp_path / "killed").exists() and "a worker was killed" in err and json.loads(out)["failed"] == []
    assert len(list(tmp_path.glob("results/smoke/*/tiny-random/word-overlap-0.json"))) == 2


def test_workers_end_with_the_grid(tmp_path):
    import psutil

    grid = begun(tmp_path, AT_WORK)
    workers = wait_for(lambda: len(found := [int(one.stem) for one in tmp_path.glob("*.works")]) == 2 and found)
    grid.kill()
    grid.wait()
    grid.stdout.close(), grid.stderr.close()
    wait_for(lambda: not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in workers), 60)
