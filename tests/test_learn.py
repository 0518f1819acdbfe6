"""What is told of a training as it goes: losses and held-out accuracy, to trackers of accelerate, and it changes nothing."""

from __future__ import annotations

import pytest
import torch
from accelerate import tracking
from small import config_of
from verbs import call

import pyargs
from pyargs.errors import PyargsError
from pyargs.learn import held_out
from pyargs.methods import lore


class Tracker:
    """One that remembers. Runs: what each was told."""

    name, requires_logging_directory = "kept", False
    runs: list = []

    def __init__(self, run: str):
        self.run, self.settings, self.values, self.finished = run, None, {}, False
        self.runs.append(self)

    def start(self) -> None: ...

    def store_init_configuration(self, values: dict) -> None:
        self.settings = values

    def log(self, values: dict, step: int) -> None:
        assert step not in self.values, "a step is told once"
        self.values[step] = values

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def kept(monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "kept", Tracker)
    monkeypatch.setattr(Tracker, "runs", [])
    return Tracker.runs


@pytest.mark.parametrize(
    "name,more",
    [("lore", {}), ("lore", {"freeze_backbone": True}), ("global_rm", {"accumulation": 2}), ("genarm", {}), ("pdpo", {})],
    ids=["lora", "frozen", "accumulated", "token reward", "user policy"],
)
def test_losses_and_held_out_accuracy_are_told_and_change_no_weight(kept, lm_folder, pairs, name, more):
    config = config_of(name, lm_folder, epochs=1, **more)
    told, plain = pyargs.train(name, pairs, config, report_to=["kept"]), pyargs.train(name, pairs, config)
    for one, other in zip(told.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    (run,) = kept
    assert run.finished and run.settings["method"] == name and run.settings["seed"] == "0"
    *_, last = sorted(run.values)
    assert run.values[1]["train/loss"] > 0 and run.values[last]["train/loss"] > 0
    assert all(torch.tensor(list(one.values())).isfinite().all() for one in run.values.values())
    assert run.values[last]["held_out/accuracy"] == held_out(told, pairs, 200)["accuracy"]


def test_a_training_that_fails_ends_its_report(kept, lm_folder, pairs, monkeypatch):
    monkeypatch.setattr(lore, "loss", lambda *_: torch.tensor(torch.nan, requires_grad=True))
    with pytest.raises(PyargsError, match="loss"):
        pyargs.train("lore", pairs, config_of("lore", lm_folder, freeze_backbone=True), report_to=["kept"])
    assert kept[0].finished


def test_a_tracker_that_is_unknown_or_missing_is_refused_before_anything_is_loaded(monkeypatch, pairs, tmp_path, capsys):
    nowhere = config_of("lore", str(tmp_path / "no model"))
    with pytest.raises(PyargsError, match="no tracker 'tensorbord': accelerate knows .*tensorboard"):
        pyargs.train("lore", pairs, nowhere, report_to=["tensorbord"])

    def missing(self):
        raise ModuleNotFoundError("No module named 'kept'")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "kept", Tracker)
    monkeypatch.setattr(Tracker, "start", missing)
    with pytest.raises(PyargsError, match="not installed. Fix: pip install kept"):
        pyargs.train("lore", pairs, nowhere, report_to=["kept"])
    words = ["train", "lore", "--tiny", "--report-to", "nothing", "--out", str(tmp_path / "out")]
    assert "no tracker 'nothing'" in call(capsys, words, expect=1) and not (tmp_path / "out").exists()


def test_tensorboard_writes_its_files(lm_folder, pairs, tmp_path):
    pytest.importorskip("tensorboard")
    config = config_of("lore", lm_folder, freeze_backbone=True, epochs=1)
    pyargs.train("lore", pairs, config, report_to=["tensorboard"], report_folder=tmp_path)
    assert list((tmp_path / "lore").glob("events.out.tfevents.*"))
