"""Every benchmark runs; how fast anything is, none of this says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyargs.lm import hub
from pyargs.ops.library import has_extension

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
CACHE = hub.cache_dir()  # the user's, before each test has one of its own; read, not written
MISSING = hub.damage("smollm2-135m")


@pytest.mark.skipif(not has_extension, reason="no extension to measure")
@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("bench_*.py")), ids=lambda path: path.stem)
def test_a_benchmark_runs(script, tmp_path):
    if MISSING and "smollm2" in script.read_text():
        pytest.skip("SmolLM2 is not in the cache: pyargs models fetch smollm2-135m")
    command = [sys.executable, script, "--quick", "--threads", "1", "--json", tmp_path / "numbers.json"]
    environment = os.environ | {"PYARGS_CACHE": str(CACHE)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert run.returncode == 0, run.stderr
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["rows"] and numbers["hardware"]["threads"] == 1
