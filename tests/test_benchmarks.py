"""Every benchmark runs; how fast anything is, none of this says."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyargs.ops.library import has_extension

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


LONG = {"bench_http", "bench_scoring", "bench_users"}  # over ten seconds each
SCRIPTS = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.nightly] if path.stem in LONG else [])
    for path in sorted(BENCHMARKS.glob("bench_*.py"))
]


@pytest.mark.skipif(not has_extension, reason="no extension to measure")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_runs(script, tmp_path):
    command = [sys.executable, script, "--quick", "--threads", "1", "--json", tmp_path / "numbers.json"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["rows"] and numbers["hardware"]["threads"] == 1


@pytest.fixture
def gpu_results():
    spec = importlib.util.spec_from_file_location("gpu_results", BENCHMARKS / "gpu_results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_numbers_of_a_gpu_are_merged(gpu_results, tmp_path):
    """Sizes that are measured one after the other, and one of them again: what is new replaces, what is not stays."""
    key = ("size", "way")
    for size, ms in [("0.5B", 1.0), ("7B", 9.0), ("0.5B", 2.0)]:
        gpu_results.add(tmp_path, "decode", {"rate": ms, "rows": [{"size": size, "way": "own", "ms": ms}]}, key)
    gpu_results.add(tmp_path, "kernels", {"rows": [{"size": "0.5B", "way": "own"}]}, key)
    gpu_results.note(tmp_path, "decode 7B", 124, 3, "one\ntwo\n")
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [(row["size"], row["ms"]) for row in found["decode"]["rows"]] == [("7B", 9.0), ("0.5B", 2.0)]
    assert len(found["kernels"]["rows"]) == 1 and found["kernels"]["provenance"]["versions"]["torch"]
    assert found["stages"]["decode 7B"] == {"exit": 124, "seconds": 3, "log": ["one", "two"]}


def gpu_part(folder: Path, part: str, fails: str) -> tuple[int, str, dict]:
    """Exit code, output and stages of a part of which commands like `fails` fail and the others do nothing."""
    case = f'case "$*" in *gpu_results*) exec "{sys.executable}" "$@" ;; {fails}) echo broken; exit 3 ;; *) echo "$@" ;; esac'
    for name in ("python", "compute-sanitizer"):
        (folder / name).write_text(f"#!/bin/sh\n{case}\n")
        (folder / name).chmod(0o755)
    environment = os.environ | {"PYTHON": str(folder / "python"), "PATH": f"{folder}:{os.environ['PATH']}"}
    command = [BENCHMARKS / "gpu.sh", "--dry-run", "--out", "found", part]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    return run.returncode, run.stdout, json.loads((folder / "found/gpu.json").read_text())["stages"]


in_a_source_tree = pytest.mark.skipif(not (BENCHMARKS / "gpu.sh").is_file(), reason="not in a source tree")


@in_a_source_tree
def test_each_part_for_a_gpu_keeps_what_failed(tmp_path):
    """Every stage runs although others fail; what it said and its exit code are in the folder, as the caller names it."""
    code, said, stages = gpu_part(tmp_path, "A", "*tests/ops*commit*")
    assert code == 1 and "FAILED: A commit (3)" in said
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == ["A.log", "gpu.json"]
    assert {name: stage["exit"] for name, stage in stages.items()} == {
        "env": 0,
        "topk_logprobs": 0,
        "score_select": 0,
        "score_step": 0,
        "tokenwise_select": 0,
        "tokenwise_step": 0,
        "user_mlp": 0,
        "commit": 3,
        "branch_attention": 0,
        "repeatable": 0,
        "captured": 0,
    }
    assert stages["commit"]["log"][-1] == "broken" and "broken" in (tmp_path / "found/A.log").read_text()


@in_a_source_tree
def test_initcheck_is_advisory(tmp_path):
    """It sees torch's own kernels, which it has to: what it says is kept, and fails nothing. The others fail the part."""
    code, said, stages = gpu_part(tmp_path, "B", "*tool?initcheck*")
    assert code == 0 and "FAILED, but advisory: B initcheck (3)" in said and stages["initcheck"]["exit"] == 3
    assert {name: "--kernel-name kns=pyargs" in stage["log"][0] for name, stage in stages.items()} == {
        "kernels": False,
        "memcheck": True,
        "racecheck": True,
        "synccheck": True,
        "initcheck": False,
    }
    code, said, _ = gpu_part(tmp_path, "B", "*--tool*")
    assert code == 1 and said.count("FAILED: B") == 3 and said.count("advisory: B initcheck (3)") == 1
