"""Every benchmark runs; how fast anything is, none of this says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pyargs.ops.library import has_extension

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.skipif(not has_extension, reason="no extension to measure")
@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("bench_*.py")), ids=lambda path: path.stem)
def test_a_benchmark_runs(script, tmp_path):
    command = [sys.executable, script, "--quick", "--threads", "1", "--json", tmp_path / "numbers.json"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["rows"] and numbers["hardware"]["threads"] == 1
