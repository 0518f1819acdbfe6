"""Training on two processes, by gloo on the CPU: the steps of one with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import several
import torch
from safetensors.torch import load_file

from pyargs import files
from pyargs.cli import main
from pyargs.errors import PyargsError
from pyargs.training import processes


@pytest.fixture(scope="module")
def both(lm_folder, tmp_path_factory):
    """The folder in which two processes have done all of `several`."""
    folder = tmp_path_factory.mktemp("both")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    environment |= {"PYARGS_CACHE": str(folder / "cache")}
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", several.__file__, str(folder), lm_folder]
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


@pytest.mark.parametrize("case", several.CASES)
def test_two_processes_make_the_steps_of_one(both, lm_folder, case):
    alone = several.trained(lm_folder, case)
    first, second = (torch.load(both[0] / f"{case}-{number}.pt") for number in range(2))
    assert len(alone["losses"]) >= 5 and first.keys() == second.keys() == alone.keys()
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), f"{name}: the processes went different ways"
        most = 1e-5 if name == "losses" else 3e-4  # Adam makes much of the last digits of small gradients
        torch.testing.assert_close(first[name], value, atol=most, rtol=most, msg=lambda said, name=name: f"{name}: {said}")


def test_a_training_that_was_killed_goes_on_in_both(both):
    for number in range(2):
        whole, found = (torch.load(both[0] / f"{case}-{number}.pt") for case in ("tables and lora", "continued"))
        assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_gradients_are_added_up(both):
    for number in range(2):
        found = torch.load(both[0] / f"toys-{number}.pt")
        assert torch.equal(found["dense"], torch.full((4, 2), 3.0))
        assert found["table"][:, 0].tolist() == found["table"][:, 1].tolist() == [0, 2, 0, 3]
        assert torch.equal(found["once"], torch.ones(4, 2))


def test_the_first_process_writes_what_one_would(both, lm_folder, tmp_path, capsys):
    folder, out = both
    assert out.count('"finished": true') == 2 and out.count('"already_done": true') == 1, "one process alone tells of it"
    assert main(several.command(lm_folder, tmp_path)) == 0
    capsys.readouterr()
    one, two = (files.read_json(at / "model.stage.json") for at in (tmp_path, folder))
    assert one["config"] == two["config"] and one["trained_parameters"] == two["trained_parameters"]
    for file in (tmp_path / "model").glob("*.safetensors"):
        for (name, a), b in zip(load_file(file).items(), load_file(folder / "model" / file.name).values(), strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4, msg=name)
    assert not list(folder.glob("model.checkpoints*")), "a finished training leaves no checkpoint"


def test_a_policy_in_parts_on_several_processes_is_refused(both):
    for number in range(2):
        assert "in parts on several processes (FSDP" in (both[0] / f"refused-{number}.txt").read_text()


@pytest.mark.parametrize("name,what", processes.WHOLE.items())
def test_launchers_that_split_the_weights_are_refused(monkeypatch, name, what):
    monkeypatch.setenv(name, "true")
    with pytest.raises(PyargsError, match=f"{what} splits weights"):
        processes.start()


@pytest.mark.parametrize("pairs", [1, 2, 5, 7])
@pytest.mark.parametrize("several", [1, 2, 3, 4])
def test_parts_make_the_batch(monkeypatch, pairs, several):
    """Whatever their number: every pair counts once, and every process has a pair to compute."""
    batch, counted, shares = list(range(pairs)), [], 0.0
    monkeypatch.setattr(processes, "count", lambda: several)
    for number in range(several):
        monkeypatch.setattr(processes, "number", lambda number=number: number)
        mine, share = processes.part(batch)
        assert mine
        counted += mine if share else []
        shares += share
    assert sorted(counted) == batch and shares == pytest.approx(1)
