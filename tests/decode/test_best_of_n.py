"""Best of n takes the best sample."""

from __future__ import annotations

import pytest
from small import config_of

from pyargs.errors import PyargsError, UnknownUser
from pyargs.lm.loading import load_lm
from pyargs.training import trainer


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
