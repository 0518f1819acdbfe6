"""Answers to any number of prompts; ways to decode that a model does not have are refused."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_lm
from small import answers, config_of

from pyargs.decode.backends import cpu
from pyargs.decode.prompts import decode_prompts
from pyargs.errors import PyargsError
from pyargs.lm.loading import load_lm
from pyargs.models.user_policy import UserPolicy
from pyargs.ops.library import has_extension
from pyargs.training import trainer


@pytest.mark.skipif(not has_extension, reason="no extension")
def test_prompts_with_one_users_demonstrations_are_neighbours(monkeypatch):
    model = UserPolicy(tiny_lm(dtype=torch.float32), tokenizer=range(61), demonstrations="some")
    shown = {"ann": [9, 8, 7], "bob": [3, 4, 5, 6]}
    monkeypatch.setattr(model, "prompt_ids", lambda prompt, user, room: shown[user] + prompt)
    asked, users = [[11, 12], [20], [30, 31, 32], [40, 41]], ["ann", "bob", "ann", "bob"]
    for possible, expected in ((True, [[1, 3, 0, 2]]), (False, [[0, 1, 2, 3]])):
        monkeypatch.setattr(cpu, "possible", lambda *models, possible=possible: possible)
        got = list(decode_prompts(None, model, asked, users, batch_size=4, max_new_tokens=2))
        assert [numbers for numbers, _, _ in got] == expected
        for numbers, ids, decoded in got:
            assert ids == [shown[users[i]] + asked[i] for i in numbers] and len(decoded.tokens) == 4


def test_impossible_ways_to_decode_raise(lm_folder, rows, monkeypatch):
    from pyargs.decode import unguided

    policy, _ = load_lm(lm_folder)
    lore_model = trainer.train("lore", rows, config_of("lore", lm_folder, freeze_backbone=True))
    self_answering = trainer.train("icl", rows, config_of("icl", lm_folder, shots=0))
    ask = lambda model, **more: answers(policy, model, ["tell me"], ["user_00"], reward_weight=1.0, **more)  # noqa: E731
    with pytest.raises(PyargsError, match="answers by itself"):
        ask(self_answering, best_of=2)
    with pytest.raises(PyargsError, match="whole vocabulary"):
        ask(lore_model, num_candidates=None)
    with pytest.raises(PyargsError, match="samples anyway"):
        ask(lore_model, best_of=2, do_sample=True)
    temperatures = []
    generate = unguided.generate
    monkeypatch.setattr(unguided, "generate", lambda *a, **k: temperatures.append(k["temperature"]) or generate(*a, **k))
    ask(lore_model, best_of=2, temperature=None)
    assert temperatures == [1.0]
    with pytest.raises(PyargsError, match="positions"):
        generate(policy, [[5, 6]], max_new_tokens=5000)


def test_a_model_without_a_head_is_sent_to_its_own_decoder(lm_folder, rows):
    from pyargs import generate

    policy, _ = load_lm(lm_folder)
    for name, decoder in (("genarm", "decode.genarm"), ("icl", "decode.unguided")):
        model = trainer.train(name, rows, config_of(name, lm_folder, **({"epochs": 0.1} if name == "genarm" else {})))
        with pytest.raises(PyargsError, match=decoder):
            generate(policy, model, torch.tensor([[5, 6]]), None, ["user_00"])
