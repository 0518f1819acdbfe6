"""Adaptation: it sees support pairs alone, and says what it cannot do before it works."""

from __future__ import annotations

import pytest
import torch
from small import config_of

from pyargs.data import of_split
from pyargs.errors import PyargsError
from pyargs.methods import lore
from pyargs.models.reward_model import RewardModel
from pyargs.training import adapt, trainer


def test_the_query_set_cannot_reach_adaptation(lm_folder, pairs):
    model = trainer.train("lore", pairs, lore.Config(backbone=lm_folder, freeze_backbone=True, epochs=2))
    model.save_pretrained(lm_folder + "-rm")
    before = torch.get_rng_state()
    ids = adapt.adapt(model, pairs)
    assert torch.equal(torch.get_rng_state(), before)  # from which an engine in another thread draws its seeds
    assert ids and set(ids) <= set(model.users.ids)
    other = RewardModel.from_pretrained(lm_folder + "-rm")
    adapt.adapt(other, of_split(pairs, "train", "train_test", "support"))
    assert torch.equal(model.users.vectors["mixture"], other.users.vectors["mixture"])
    with pytest.raises(PyargsError, match="no rows with split 'support'"):
        adapt.adapt(other, of_split(pairs, "query"))
    with pytest.raises(PyargsError, match="there already"):
        adapt.adapt(other, pairs)


def test_new_vectors_are_those_that_adapt_adds(lm_folder, rows):
    """Of known users too, and the model stays as it is."""
    model = trainer.train("lore", rows, config_of("lore", lm_folder))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids, vectors = adapt.new_vectors(model, rows)
    assert list(model.users.ids) == [f"user_{i:02d}" for i in range(4)] and not set(ids) & set(model.users.ids)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert adapt.adapt(model, rows) == ids
    assert torch.equal(model.users.vectors["mixture"][model.users.rows(ids)], vectors["mixture"])
    again, same = adapt.new_vectors(model, rows, again=True)
    assert again == ids and torch.equal(same["mixture"], vectors["mixture"])
    nobody = trainer.train("global_rm", rows, config_of("global_rm", lm_folder, epochs=0.1))
    assert adapt.new_vectors(nobody, rows) == (ids, None)


def test_known_users_and_useless_steps_raise_before_any_work(lm_folder, rows, monkeypatch):
    for name in ("icl", "vpl", "lore"):
        model = trainer.train(name, rows, config_of(name, lm_folder, **({} if name == "icl" else {"epochs": 0.1})))
        adapt.adapt(model, rows)
        monkeypatch.setattr(type(model), "read", lambda *_: pytest.fail("work before the check"), raising=False)
        with pytest.raises(PyargsError, match="is there already: adapt it anew"):
            adapt.adapt(model, rows)
        monkeypatch.undo()
        if name != "lore":
            with pytest.raises(PyargsError, match="takes no steps"):
                adapt.adapt(model, rows, steps=3)
