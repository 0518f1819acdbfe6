"""Users who leave a model, and users who are adapted anew: what is left of them, and that nobody else notices."""

from __future__ import annotations

import json

import pytest
import torch
from small import scores

from pyargs import cli, forget, load_model
from pyargs.data import of_split, synthetic
from pyargs.errors import PyargsError, UnknownUser
from pyargs.training import adapt, hooks, trainer

KINDS = {
    "lore": dict(rank=2, freeze_backbone=True, epochs=0.1, adapt_steps=5),
    "pref": dict(rank=2, freeze_backbone=True, epochs=0.1, adapt_steps=5),
    "mpu": dict(hidden=4, freeze_backbone=True, epochs=0.1, adapt_steps=5, adapt_init="mean"),
    "pdpo": dict(soft_tokens=2, epochs=0.1, adapt_steps=1, adapt_lr=0.1),
    "icl": dict(shots=2),
}


@pytest.fixture(scope="module")
def rows():
    return synthetic.load(users=2, pairs=8, new_users=3, support=4, query=2)


@pytest.fixture(scope="module", params=KINDS)
def folder(request, lm_folder, rows, tmp_path_factory):
    """A model with its new users, saved."""
    config = hooks.method(request.param).Config(backbone=lm_folder, **KINDS[request.param])
    model = trainer.train(request.param, rows, config)
    adapt.adapt(model, rows)
    where = tmp_path_factory.mktemp(request.param) / "model"
    model.save_pretrained(where)
    return where


def test_users_are_forgotten_and_the_others_stay_as_they_were(folder, rows, tmp_path):
    model, query = load_model(folder), of_split(rows, "query")
    stays = query.filter(lambda row: row["user_id"] == "new_02")
    before = scores(model, stays)
    for unknown in (["new_00", "new_07"], ["new_07"]):
        with pytest.raises(UnknownUser, match="'new_07'.*new_0"):
            forget(model, unknown)
    with pytest.raises(PyargsError, match="a list with one id"):
        forget(model, "new_00")
    assert set(model.known_users) >= {"new_00", "new_01", "new_02"}  # nobody is gone yet
    forget(model, ["new_00", "new_01", "new_00"])
    assert torch.equal(scores(model, stays), before)
    with pytest.raises(UnknownUser):
        scores(model, query)
    model.save_pretrained(tmp_path / "m")
    written = "".join(file.read_text() for file in (tmp_path / "m").glob("*.json"))
    assert "new_00" not in written and "new_01" not in written and "new_02" in written
    again = load_model(tmp_path / "m")
    assert torch.equal(scores(again, stays), before)
    adapt.adapt(again, rows.filter(lambda row: row["user_id"] != "new_02"))  # and they may come back
    assert torch.equal(scores(again, query), scores(load_model(folder), query))


def test_users_are_adapted_anew_when_it_is_asked_for(folder, rows):
    others = rows.map(lambda row: {"chosen": row["rejected"], "rejected": row["chosen"]})
    others = others.filter(lambda row: row["user_id"] == "new_01")
    query = of_split(rows, "query")
    model, fresh = load_model(folder), load_model(folder)
    with pytest.raises(PyargsError, match="again=True"):
        adapt.adapt(model, others)
    assert torch.equal(scores(model, query), scores(fresh, query))
    adapt.adapt(model, others, again=True)
    forget(fresh, ["new_01"])
    adapt.adapt(fresh, others)
    assert torch.equal(scores(model, query), scores(fresh, query))
    assert not torch.equal(scores(model, query), scores(load_model(folder), query))


def test_users_may_be_adapted_in_any_order(folder, rows):
    """As many times as one likes, together or one by one: what a user becomes depends on the training and its own pairs."""
    model, query = load_model(folder), of_split(rows, "query")
    before = scores(model, query)
    adapt.adapt(model, rows, again=True)
    assert torch.equal(scores(model, query), before)
    forget(model, ["new_00", "new_01", "new_02"])
    for user in ("new_02", "new_00", "new_01"):
        adapt.adapt(model, rows.filter(lambda row, user=user: row["user_id"] == user))
    assert torch.equal(scores(model, query), before)


def test_without_trained_users_there_is_no_mean_to_begin_at(folder, rows):
    model = load_model(folder)
    forget(model, [user for user in model.known_users if user.startswith("user_")])
    if model.about["method"] == "pref" or model.about["fields"].get("adapt_init") == "mean":
        with pytest.raises(PyargsError, match="no user of the training is left"):
            adapt.adapt(model, rows, again=True)
    else:
        adapt.adapt(model, rows, again=True)


def test_users_leave_a_folder_by_the_command_line(folder, rows, tmp_path, capsys):
    assert cli.main(["forget", str(folder), "new_00", "--out", str(tmp_path / "m")]) == 0
    assert json.loads(capsys.readouterr().out)["users"] == len(load_model(folder).known_users) - 1
    assert "new_00" not in load_model(tmp_path / "m").known_users and "new_00" in load_model(folder).known_users
    assert cli.main(["forget", str(folder), "nobody", "--out", str(tmp_path / "n")]) == 1
    assert not (tmp_path / "n").exists()
    pairs = tmp_path / "pairs.jsonl"
    of_split(rows, "support").to_json(pairs)
    words = [str(folder), "--data", str(pairs), "--out", str(tmp_path / "again")]
    assert cli.main(["adapt", *words]) == 1
    assert cli.main(["adapt", *words, "--again"]) == 0


def test_a_model_without_users_has_nobody_to_forget(lm_folder, rows):
    config = hooks.method("global_rm").Config(backbone=lm_folder, freeze_backbone=True, epochs=0.1)
    with pytest.raises(UnknownUser, match="no user 'user_00'"):
        forget(trainer.train("global_rm", rows, config), ["user_00"])
