"""`--cells i/n`: parts of the grid on machines that share nothing, and the whole that their files make."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import grid, reproduce
from experiments.__main__ import main
from experiments.profiles import PROFILES
from pyargs import files


@given(st.sampled_from(sorted(PROFILES)), st.integers(1, 300))
def test_every_cell_is_in_one_part_and_every_model_too(profile, of):
    asked = reproduce.cells(profile)
    parts = [grid.shard(asked, number, of) for number in range(of)]
    assert sorted(cell for part in parts for cell in part) == sorted(asked)
    models = [{(cell.set, cell.row, cell.seed) for cell in part} for part in parts]
    assert sum(map(len, models)) == len(set().union(*models))
    sizes = [len(one) for one in models]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("word", ["4/4", "1/0", "0", "1/", "/2", "-1/2", "a/b", "1/2/3", ""])
def test_a_part_that_is_none_is_refused(word, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["reproduce", "smoke", f"--cells={word}", "--dry-run"])
    assert "I from 0 to N - 1" in capsys.readouterr().err


def test_a_part_beyond_the_models_is_empty_and_no_error(tmp_path, capsys):
    words = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    assert main(["reproduce", "smoke", "--only", "LoRE", "--cells", "1/2", *words]) == 0
    assert json.loads(capsys.readouterr().out) == {"cells": 0, "run_now": 0, "failed": []}


def test_the_files_of_all_parts_are_those_of_one_run(tmp_path, monkeypatch, encoder):
    """Each part on a machine of its own: nothing is there but what it computes."""
    settings = PROFILES["smoke"]["sets"]["synthetic"]
    rows = {name: settings["rows"][name] for name in ("Zero-Shot", "Global RM", "ARGS, weight 0", "word overlap")}
    rows["Global RM"] = ("global_rm", {"freeze_backbone": True, "epochs": 0.5})
    changed = {"rows": rows, "bertscore": encoder, "decode": ["--limit", "3", "--max-new-tokens", "4"]}
    changed["tune"] = ["--objective", "harmonic", "--grid", "0", "1", "--prompts", "2", "--max-new-tokens", "2"]
    monkeypatch.setitem(PROFILES["smoke"]["sets"], "synthetic", {**settings, **changed})

    def made(name: str, cells: list) -> Path:
        monkeypatch.setenv("PYARGS_CACHE", str(tmp_path / name / "cache"))
        places = reproduce.Places(tmp_path / "none", tmp_path / name / "work", tmp_path / name / "results")
        for cell in cells:
            reproduce.run(cell, places)
        return places.results

    asked = reproduce.cells("smoke")
    whole, merged = made("whole", asked), tmp_path / "merged"
    for number in range(2):
        results = made(str(number), grid.shard(asked, number, 2))
        assert not {file.relative_to(results) for file in results.rglob("*.json")} & {
            file.relative_to(merged) for file in merged.rglob("*.json")
        }
        shutil.copytree(results, merged, dirs_exist_ok=True)
    places = reproduce.Places(tmp_path / "none", tmp_path, merged)
    for cell in asked:
        assert numbers(reproduce.result_file(cell, places)) == numbers(
            reproduce.result_file(cell, places._replace(results=whole))
        ), cell.name()
        assert reproduce.done(cell, places), "a run over the merged files has nothing left to do"


def numbers(file: Path) -> str:
    """All that a cell's file says, but for seconds and provenance."""
    return json.dumps({name: value for name, value in files.read_json(file).items() if name not in ("seconds", "provenance")})
