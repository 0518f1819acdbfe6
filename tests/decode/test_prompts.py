"""Ways to decode that a model does not have are refused."""

from __future__ import annotations

import pytest
import torch
from small import answers, config_of

from pyargs.errors import PyargsError
from pyargs.lm.loading import load_lm
from pyargs.training import trainer


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
    for name, decoder in (("genarm", "tokenwise"), ("icl", "plain")):
        model = trainer.train(name, rows, config_of(name, lm_folder, **({"epochs": 0.1} if name == "genarm" else {})))
        with pytest.raises(PyargsError, match=decoder):
            generate(policy, model, torch.tensor([[5, 6]]), None, ["user_00"])
