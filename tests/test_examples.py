"""The examples run, and give the tokens of the engine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import pyargs
from pyargs.data.synthetic import tiny_lm

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny random language model and a reward model trained over it, as folders."""
    import pyargs.data
    from pyargs.training.hooks import method

    folder = tmp_path_factory.mktemp("examples")
    lm = str(tiny_lm(folder / "lm"))
    config = method("lore").Config(backbone=lm, freeze_backbone=True, epochs=2)
    model = pyargs.train("lore", pyargs.data.load("synthetic", users=3, pairs=10), config)
    model.save_pretrained(folder / "model")
    return lm, str(folder / "model"), list(model.users.ids)[:2]


@pytest.mark.parametrize("name", ["own_loop", "generate"])
@pytest.mark.parametrize("weight", [None, 25.0])
def test_examples_give_the_tokens_of_the_engine(name, weight, trained, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    lm, folder, users = trained
    words = ["--model", lm, "--reward-model", folder, "--users", *users, "--max-new-tokens", "20"]
    tokens = __import__(name).main(words + (["--reward-weight", str(weight)] if weight else []))

    quick = sys.modules["quick"]
    policy, tokenizer = pyargs.load_lm(lm)
    model, inputs = pyargs.RewardModel.from_pretrained(folder), quick.prompts(tokenizer)
    weight = weight or quick.unit_weight(policy, model, inputs, users)
    answers = pyargs.Engine(policy, model).generate(quick.PROMPTS, users, reward_weight=weight, max_new_tokens=20)
    for row, answer in zip(tokens.tolist(), answers, strict=True):
        n = len(answer.tokens)
        assert row[:n] == answer.tokens
        assert row[n] in policy.generation_config.eos_token_id if answer.finish_reason == "stop" else n == 20
    assert any(any(answer.slots) for answer in answers), "nothing was guided: the test would pass without a reward"
    printed = capsys.readouterr().out
    assert all(f"{user}: " in printed for user in users)


def test_an_example_trains_a_head_when_it_is_given_none(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    tokens = __import__("own_loop").main(["--model", str(tiny_lm(tmp_path / "lm")), "--max-new-tokens", "4"])
    assert len(tokens) == 2 and "ada: " in capsys.readouterr().out
