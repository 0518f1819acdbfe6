"""The workflow and the scripts of .ci: what they name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
SCRIPTS = sorted([*(ROOT / ".ci").iterdir(), ROOT / "Makefile", *ROOT.glob("*/*.sh")])


def test_the_workflow_runs_the_scripts_of_ci_and_nothing_else():
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    lines = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert lines == {"run": ["bash .ci/run"], "wheel": ["bash .ci/wheel dist"]}
    for (line,) in lines.values():
        assert (ROOT / line.split()[1]).is_file()
    for job in jobs.values():
        assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in job["steps"] if "uses" in step)


def test_every_allowed_python_is_run_or_marked_as_never_run():
    text = WORKFLOW.read_text()
    least = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())[1]
    for job in yaml.safe_load(text)["jobs"].values():
        versions = job["strategy"]["matrix"]["python"]
        assert versions[0] == f"3.{least}"
        remark = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
        run, never = remark.split("This file has never been run")
        for version in versions:
            assert (version in run) + (version in never) == 1, version


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_that_a_script_names_are_there(script):
    text = re.sub(r"^ *#(?!!).*", "", script.read_text(), flags=re.MULTILINE)
    named = re.findall(r"(?<![\w/.$}])((?:\.ci|tests|experiments|benchmarks|csrc|examples)/[\w./-]*\w)(?![\w*$])", text)
    missing = [name for name in named if not (ROOT / name).exists() and name.partition("/")[2] != "results"]
    assert not missing


def test_nightly_runs_every_part_that_it_knows():
    text = (ROOT / ".ci" / "nightly").read_text()
    known = re.findall(r"^    (\w+)\) ", text, flags=re.MULTILINE)
    assert re.search(r"parts=\(([a-z ]+)\)\n", text)[1].split() == known
