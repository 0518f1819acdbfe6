"""Best of N takes the best of N whole answers."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import reward_model, tiny_lm
from small import config_of

from pyargs.decode import best_of_n
from pyargs.errors import PyargsError, UnknownUser
from pyargs.lm.loading import load_lm
from pyargs.training import trainer


def test_infinite_rewards_choose_no_sample(monkeypatch):
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    monkeypatch.setattr(type(model), "score", lambda self, groups, users: [torch.full((len(groups[0][1]),), math.inf)])
    with pytest.raises(PyargsError, match="not finite numbers"):
        best_of_n.generate(policy, model, [[1, 2]], ["ann"], n=2, max_new_tokens=2)
    for n in (0, 2.0, True):
        with pytest.raises(PyargsError, match="n must be a whole number"):
            best_of_n.generate(policy, model, [[1, 2]], ["ann"], n=n)


def test_best_of_n_takes_the_best_sample(lm_folder, rows):
    from pyargs.decode import best_of_n

    policy, _ = load_lm(lm_folder)
    model = trainer.train("lore", rows, config_of("lore", lm_folder, freeze_backbone=True))
    prompts, users = [[5, 6, 7], [8, 9, 10, 11, 12]], ["user_00", "user_01"]
    best, rewards = best_of_n.generate(policy, model, prompts, users, n=5, max_new_tokens=6, seed=3)
    assert rewards.shape == (2, 5)
    for decoded, reward, prompt, user in zip(best, rewards, prompts, users, strict=True):
        (answer,) = decoded.answers()
        assert model.score([(prompt, [answer])], [user])[0].item() == pytest.approx(reward.max().item(), abs=1e-5)
    alone, _ = best_of_n.generate(policy, model, prompts[1:], users[1:], n=5, max_new_tokens=6, seed=[3 * 1_000_003 + 1])
    assert alone[0].answers() == best[1].answers()
    with pytest.raises(UnknownUser):
        best_of_n.generate(policy, model, prompts, ["user_00", "nobody"], n=2)
    with pytest.raises(PyargsError, match="at least 1"):
        best_of_n.generate(policy, model, prompts, users, n=0)
