"""A weight that means something: w in units of 1 / reward_std."""

from __future__ import annotations

import json
import logging

import pytest
from small import config_of

import pyargs
from pyargs.decode.engine import Engine
from pyargs.decode.strength import reward_std
from pyargs.errors import PyargsError

WISH = dict(max_new_tokens=5, stop=[])


@pytest.fixture(scope="module")
def model(lm_folder, pairs):
    return pyargs.train("lore", pairs, config_of("lore", lm_folder, freeze_backbone=True))


def tokens(engine, user, **wish):
    return [one.tokens for one in engine.generate(["tell me more", "and then"], [user] * 2, **WISH, **wish)]


def test_a_trained_model_carries_its_unit_and_strength_is_the_weight_in_it(model, lm_folder, tmp_path):
    user = next(iter(model.users.ids))
    (unit,) = model.about["reward_std"].values()
    engine = Engine(lm_folder, model)
    for strength in (0.5, 1.0, 7.0):
        one = engine.submit("tell me more", user, strength=strength, **WISH)
        while engine.busy:
            engine.step()
        assert engine.answer(one).reward_weight == pytest.approx(strength / unit)
        assert tokens(engine, user, strength=strength) == tokens(engine, user, reward_weight=strength / unit)
    assert tokens(engine, user) == tokens(engine, user, strength=1.0)
    model.save_pretrained(tmp_path / "lore")
    assert pyargs.load_model(tmp_path / "lore").about["reward_std"] == model.about["reward_std"]


def test_the_unit_is_the_spread_of_unguided_text(model, lm_folder):
    user = next(iter(model.users.ids))
    answers = Engine(lm_folder, model).generate(["tell me more"], [user], reward_weight=0.0, **WISH)
    (only,) = answers
    assert reward_std(answers) == pytest.approx((sum(s * s for s in only.spreads) / len(only.spreads)) ** 0.5)
    assert reward_std([]) == 0.0


def test_another_policy_is_measured_once_and_said(model, lm_folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PYARGS_CACHE", str(tmp_path))
    user = next(iter(model.users.ids))
    found = []
    for _ in range(2):
        other = pyargs.load_lm(lm_folder)[0]
        other.lm_head.weight.data.mul_(1.5)
        other.get_decoder().norm.weight.data.mul_(1.3)
        engine = Engine(other, model)
        with caplog.at_level(logging.WARNING, "pyargs"):
            caplog.clear()
            (answer,) = engine.generate(["tell me more"], [user], strength=2.0, **WISH)
        found.append((answer.reward_weight, "measuring it once" in caplog.text))
    (file,) = (tmp_path / "strength").iterdir()
    assert found[0] == (pytest.approx(2.0 / json.loads(file.read_text())["reward_std"]), True)
    assert found[1] == (found[0][0], False)
    model.users.append(["late"], **{name: value[:1].detach() for name, value in model.users.vectors.items()})
    with caplog.at_level(logging.WARNING, "pyargs"):
        caplog.clear()
        (answer,) = Engine(other, model).generate(["tell me more"], ["late"], strength=2.0, **WISH)
    model.users.remove(["late"])
    assert answer.reward_weight == found[0][0] and "measuring it once" not in caplog.text
    (own,) = model.about["reward_std"].values()
    assert found[0][0] != pytest.approx(2.0 / own)


def test_a_model_without_a_unit_names_the_command_and_both_weights_are_refused(model, lm_folder, monkeypatch):
    user, engine = next(iter(model.users.ids)), Engine(lm_folder, model)
    monkeypatch.setattr(model, "about", {name: value for name, value in model.about.items() if name != "reward_std"})
    with pytest.raises(PyargsError, match="pyargs t"):
        engine.submit("hello", user)
    assert tokens(engine, user, reward_weight=0.3)
    assert tokens(engine, user, strength=0.0) == tokens(engine, user, reward_weight=0.0)
    with pytest.raises(PyargsError, match="one of them"):
        engine.submit("hello", user, strength=1.0, reward_weight=1.0)


def test_rewards_that_never_differ_are_no_unit(model, lm_folder, monkeypatch):
    monkeypatch.setattr(model, "about", model.about | {"reward_std": dict.fromkeys(model.about["reward_std"], 0.0)})
    with pytest.raises(PyargsError, match="never differ"):
        Engine(lm_folder, model).submit("hello", next(iter(model.users.ids)))
