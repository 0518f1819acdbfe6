"""Bulk work on a Ray cluster: workers answer as one engine does, and one that is killed is replaced."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
from small import config_of, saved
from verbs import call

from pyargs import files
from pyargs.decode.engine import Engine
from pyargs.decode.request import numbered
from pyargs.errors import PyargsError
from pyargs.models.reward_model import RewardModel
from pyargs.training.hooks import method


@pytest.fixture(scope="module")
def on_ray():
    """The module, on a cluster of this machine's own with two CPUs. Ray is imported only where these tests run."""
    ray = pytest.importorskip("ray", reason="the extra [ray] is not installed")
    place = tempfile.mkdtemp(prefix="ray")  # Ray's sockets want a short name
    before = dict(os.environ)
    os.environ |= {"PYTHONPATH": os.pathsep.join(sys.path), "RAY_TMPDIR": place, "RAY_worker_niceness": "0"}
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="WARNING", log_to_driver=False)
    from pyargs import ray as own

    yield own
    ray.shutdown()
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def folder(lm_folder, tmp_path_factory) -> str:
    """A model of the users a, b, c and d."""
    folder = tmp_path_factory.mktemp("model") / "lore"
    saved(method("lore"), config_of("lore", lm_folder, freeze_backbone=True), folder, lm_folder)
    return str(folder)


def asked(count: int = 7) -> list[dict]:
    users = ("a", "b", "c", "d")
    return [
        {"prompt": f"tell {n} cat dog", "user_id": users[n % 4], "seed": numbered(3, n), "number": n} for n in range(count)
    ]


def answers(folder, lm_folder, rows, **wish) -> list[dict]:
    """What one engine answers, with the columns that the rows had."""
    made = Engine(lm_folder, folder).generate([r["prompt"] for r in rows], [r["user_id"] for r in rows], seed=3, **wish)
    return [{**row, **{name: getattr(one, name) for name in COLUMNS}} for row, one in zip(rows, made, strict=True)]


WISH = dict(reward_weight=2.0, max_new_tokens=5)
COLUMNS = ("text", "tokens", "finish_reason", "rewards", "slots", "backend")


def test_workers_answer_as_one_engine_does(on_ray, folder, lm_folder):
    """Sampled answers by two workers, in whatever blocks the prompts come; columns that were there stay."""
    rows, wish = asked(), WISH | {"temperature": 1.0}
    data = on_ray.ray.data.from_items(rows, override_num_blocks=3)
    found = on_ray.all_rows(on_ray.map_prompts(data, folder, policy=lm_folder, max_rows=2, workers=2, **wish))
    assert sorted(found, key=lambda row: row["number"]) == answers(folder, lm_folder, rows, **wish)


@pytest.mark.nightly
def test_a_killed_worker_is_replaced_and_an_error_is_one_line(on_ray, folder, lm_folder, tmp_path):
    """Killed while it loads its engine: `killed` is made by the first."""

    class Mortal(on_ray.Answering):
        def __call__(self, batch):
            if not (mark := tmp_path / "killed").exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(batch)

    rows, plain = asked(), on_ray.Answering
    on_ray.Answering = Mortal
    try:
        data = on_ray.ray.data.from_items(rows, override_num_blocks=3)
        found = on_ray.all_rows(on_ray.map_prompts(data, folder, policy=lm_folder, max_rows=2, workers=1, **WISH))
    finally:
        on_ray.Answering = plain
    assert (tmp_path / "killed").exists()
    assert sorted(found, key=lambda row: row["number"]) == answers(folder, lm_folder, rows, **WISH)
    nobody = on_ray.ray.data.from_items([{"prompt": "tell", "user_id": "nobody"}])
    with pytest.raises(PyargsError, match="^[^\n]*'nobody'[^\n]*$"):
        on_ray.all_rows(on_ray.map_prompts(nobody, folder, policy=lm_folder, **WISH))


def test_sampling_wants_seeds(folder, lm_folder):
    """A call that is made again must give the same."""
    ray = pytest.importorskip("pyargs.ray", reason="the extra [ray] is not installed", exc_type=PyargsError)
    made = dict(files=None, pair=dict(policy=lm_folder), threads=1, options=dict(best_of=0))
    rows = [{name: row[name] for name in ("prompt",)} for row in asked(2)]
    worker = ray.Answering(**made, wish={"temperature": 1.0, "max_new_tokens": 2})
    with pytest.raises(PyargsError, match="need a column seed"):
        worker(ray.pyarrow.Table.from_pylist(rows))


def test_what_no_worker_could_do_is_refused_at_once(on_ray, folder, lm_folder):
    data = on_ray.ray.data.from_items([{"prompt": "tell", "user_id": "a"}])
    with pytest.raises(PyargsError, match="column"):
        on_ray.map_prompts(data, folder, policy=lm_folder, seed=1)
    with pytest.raises(PyargsError, match="max_tokens"):
        on_ray.map_prompts(data, folder, policy=lm_folder, max_tokens=1)
    with pytest.raises(PyargsError, match="save_pretrained"):
        on_ray.map_prompts(data, RewardModel, policy=lm_folder)


@pytest.mark.nightly
def test_decoding_on_ray_writes_the_same_file(on_ray, stages, capsys, tmp_path):
    folder, steps = stages
    for verb in ("train", "adapt", "tune"):
        call(capsys, steps[verb])
    words = [*steps["decode"][: steps["decode"].index("--out")], "--batch-size", "1", "--out"]
    here, there = (tmp_path / name for name in ("here.jsonl", "there.jsonl"))
    call(capsys, [*words, str(here)])
    made = call(capsys, [*words, str(there), "--on", "ray"])
    assert there.read_bytes() == here.read_bytes() and made["answers"] == 5
    keys = [files.read_json(f"{one}.stage.json") for one in (here, there)]
    assert keys[0]["config"] == keys[1]["config"] and keys[0]["inputs"] == keys[1]["inputs"]
    assert call(capsys, [*words, str(here), "--on", "ray"])["already_done"], "the same stage, wherever it is computed"
    assert "add --on ray" in call(capsys, [*words, str(tmp_path / "x.jsonl"), "--num-cpus", "2"], expect=1)


# -- the grid ----------------------------------------------------------------------------------------------------------


def test_what_a_cell_needs_of_a_machine(on_ray):
    from experiments.on_ray import GIB, needs
    from experiments.profiles import Cell

    alone = needs(Cell("paper", "pref_lamp", "Qwen/Qwen2.5-7B-Instruct", "word overlap", 0), 4)
    assert alone == {"num_cpus": 4, "num_gpus": 0, "memory": GIB}
    small, large = (
        needs(Cell("paper", "pref_lamp", f"Qwen/Qwen2.5-{size}-Instruct", "LoRE", 0), 4) for size in ("0.5B", "7B")
    )
    assert small["num_gpus"] == large["num_gpus"] == 1 and large["memory"] - small["memory"] == 3 * 2 * 65 * 10**8
    assert needs(Cell("cpu", "pref_lamp", "smollm2-135m", "LoRE", 0), 1)["num_gpus"] == 0


def cells(folder: Path) -> dict[str, str]:
    """All cells' files but for seconds and provenance."""
    found = {}
    for file in sorted(folder.rglob("*.json")):
        whole = {name: value for name, value in files.read_json(file).items() if name not in ("seconds", "provenance")}
        found[str(file.relative_to(folder))] = json.dumps(whole)
    return found


@pytest.mark.nightly
def test_a_cell_on_ray_is_the_cell_here(on_ray, tmp_path, capsys):
    from experiments.__main__ import main

    words = ["reproduce", "smoke", "--only", "word overlap", "--work", str(tmp_path / "work")]
    assert main([*words, "--workers", "1", "--results", str(tmp_path / "here")]) == 0
    assert main([*words, "--on", "ray", "--results", str(tmp_path / "there")]) == 0
    assert cells(tmp_path / "there") == cells(tmp_path / "here") != {}
    assert main([*words, "--on", "ray", "--workers", "1"]) == 1
    assert "leave it out" in capsys.readouterr().err


@pytest.mark.nightly
def test_a_grid_whose_workers_are_killed_is_the_grid_here(on_ray, tmp_path):
    """Every worker that evaluates is killed once: what was finished before stays, and the files are those of a local run."""
    from experiments import grid, reproduce
    from experiments import on_ray as grid_on_ray
    from pyargs.progress import progress_bar

    asked = grid.chosen("smoke", ["Zero-Shot", "Global RM", "ARGS, weight 0", "word overlap"], None, None)
    here, there = (
        reproduce.Places(tmp_path / "none", tmp_path / name / "work", tmp_path / name) for name in ("here", "there")
    )
    for cell in asked:
        reproduce.run(cell, here)
    killed, kept = [], {}

    def kill() -> None:
        """Of `finish`, when the model and the answers of its cell are there."""
        while len(killed) < 2:
            for process in psutil.process_iter(["cmdline"]):
                if "ray::finish" in " ".join(process.info["cmdline"] or []) and process.pid not in killed:
                    kept.update({file: file.stat().st_mtime_ns for file in there.work.rglob("*.safetensors")})
                    process.kill()
                    killed.append(process.pid)
            time.sleep(0.02)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with progress_bar(total=len(asked)) as bar:
        assert grid_on_ray.run_all(asked, there, bar, None) == {}
    assert len(killed) == 2 and kept
    assert {file: file.stat().st_mtime_ns for file in kept} == kept, "a finished model was made again"
    assert cells(there.results / "smoke") == cells(here.results / "smoke")
    assert all(reproduce.done(cell, there) for cell in asked)
