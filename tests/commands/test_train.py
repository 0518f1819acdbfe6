"""`pyargs train`: what a method's options say, what --tiny presets, stdout for JSON alone."""

from __future__ import annotations

import json
import pkgutil

import pytest
from verbs import call, run

from pyargs import cli, load_model, methods
from pyargs.data import of_split, synthetic
from pyargs.learn import held_out

METHODS = [module.name for module in pkgutil.iter_modules(methods.__path__)]


def test_every_option_of_a_method_explains_itself():
    text = run("train", "lore", "--help").stdout
    assert "--freeze-backbone" in text and "--rank" in text
    from dataclasses import fields

    from pyargs.training import hooks
    from pyargs.tune import Tuning

    for config in (*(hooks.method(name).Config for name in METHODS), Tuning):
        assert all(len(field.metadata.get("help", "")) > 5 for field in fields(config)), config


def test_full_training_keeps_stdout_for_json(stages, capsys, tmp_path):
    folder, _ = stages
    words = [
        "train",
        "--data",
        "synthetic",
        "lore",
        "--backbone",
        str(folder / "lm"),
        "--epochs",
        "0.2",
        "--out",
        str(tmp_path / "rm"),
    ]
    assert call(capsys, words)["method"] == "lore"  # call() parses all of stdout; the method may stand anywhere


@pytest.mark.parametrize("name", METHODS)
def test_the_smoke_profile_presets_what_it_says_and_flags_win(name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    plan = call(capsys, ["train", name, "--tiny", "--dry-run"])
    assert plan["backbone"] == "tiny-random" and plan["out"] == f"output/tiny/{name}" and plan["pairs"] > 0
    assert plan["steps"] == (0 if name == "icl" else 12)
    plan = call(capsys, ["train", name, "--tiny", "--out", "else", "--backbone", "other", "--dry-run"])
    assert plan["out"] == "else" and plan["backbone"] == "other"
    assert not any(tmp_path.iterdir())


def test_training_ends_with_an_accuracy_or_says_why_there_is_none(tmp_path, capsys):
    folder, rows = str(synthetic.tiny_lm(tmp_path / "lm")), synthetic.load(users=2, pairs=20, new_users=1, support=2, query=2)
    of_split(rows, "train", "train_test").to_json(tmp_path / "pairs.jsonl")
    for name, more in (("lore", ["--freeze-backbone"]), ("icl", [])):
        words = ["--backbone", folder, "--data", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / name), *more]
        assert cli.main(["train", name, *words]) == 0
        found = json.loads(capsys.readouterr().out)["held_out"]
        if name == "icl":
            assert "after `pyargs adapt`" in found
            continue
        held, model = of_split(rows, "train_test"), load_model(tmp_path / name)
        chosen, rejected = model.pair_scores(held)[1].unbind(1)
        right = 100 * (chosen > rejected).float().mean().item()
        assert found == {"split": "train_test", "pairs": len(held), "accuracy": pytest.approx(right, abs=0.06)}
        assert len(held) > 4 and "nothing tells how well" in held_out(model, of_split(rows, "train"))
        assert held_out(model, held, most=3)["pairs"] <= 3
