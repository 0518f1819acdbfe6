"""`pyargs train`."""

from __future__ import annotations

import json

import pytest

from pyargs import cli, load_model
from pyargs.commands.train import held_out
from pyargs.data import of_split, synthetic


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
