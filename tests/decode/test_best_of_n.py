"""Best of N takes the best of N whole answers."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import reward_model, tiny_lm
from small import config_of

from pyargs.decode.engine import Engine
from pyargs.errors import PyargsError, UnknownUser
from pyargs.lm.loading import load_lm
from pyargs.models.token_reward import TokenReward
from pyargs.training import trainer


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_rewards_that_are_not_finite_choose_no_sample(value, monkeypatch):
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    monkeypatch.setattr(type(model), "score", lambda self, groups, users: [torch.full((len(groups[0][1]),), value)])
    with pytest.raises(PyargsError, match="not finite numbers"):
        Engine(policy, model, best_of=2).generate([[1, 2]], ["ann"], max_new_tokens=2, stop=[])


def test_what_it_can_not_do_is_refused_by_name():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    for n in (-1, 2.0, True, "2"):
        with pytest.raises(PyargsError, match="best_of must be a whole number"):
            Engine(policy, model, best_of=n)
    with pytest.raises(PyargsError, match="best_of needs a reward model"):
        Engine(policy, best_of=2)
    engine = Engine(policy, model, best_of=2)
    for wish in (dict(reward_weight=1.0), dict(strength=1.0), dict(num_candidates=5)):
        with pytest.raises(PyargsError, match="leave (it|them) out"):
            engine.generate([[1, 2]], ["ann"], **wish)
    with pytest.raises(PyargsError, match="use generate"):
        engine.stream([1, 2], "ann")
    with pytest.raises(UnknownUser, match="nobody"):
        engine.generate([[1, 2], [3]], ["ann", "nobody"])
    assert not engine.busy


def test_a_sample_that_the_reward_model_does_not_know_is_refused():
    policy = tiny_lm(vocab=80)
    policy.lm_head.weight.data[61:] *= 50
    policy.generation_config.eos_token_id = None
    model = reward_model(tiny_lm(vocab=61))
    with pytest.raises(PyargsError, match="beyond the 61|knows 61"):
        Engine(policy, model, best_of=2).generate([[1, 2]], ["ann"], max_new_tokens=4)


@pytest.mark.parametrize("kind", ["reward model", "token reward"])
def test_best_of_n_takes_the_best_sample(lm_folder, rows, kind):
    policy, _ = load_lm(lm_folder)
    model = (
        trainer.train("lore", rows, config_of("lore", lm_folder, freeze_backbone=True))
        if kind == "reward model"
        else TokenReward(*load_lm(lm_folder))
    )
    prompts, users = [[5, 6, 7], [8, 9, 10, 11, 12]], ["user_00", "user_01"]
    engine = Engine(policy, model, best_of=5, max_rows=4)
    answers = engine.generate(prompts, users, max_new_tokens=6, seed=3)
    samples = Engine(policy, max_rows=10)
    for number, (answer, prompt, user) in enumerate(zip(answers, prompts, users, strict=True)):
        assert (answer.user, answer.prompt, len(answer.rewards)) == (user, prompt, 5)
        drawn = samples.generate([prompt] * 5, temperature=1.0, max_new_tokens=6, seed=3 * 1_000_003 + number)
        scored = iter(model.score([(prompt, [one.tokens for one in drawn if one.tokens])], [user])[0].tolist())
        given = [next(scored) if one.tokens else -math.inf for one in drawn]
        assert answer.rewards == pytest.approx(given, abs=1e-5)
        assert answer.tokens == drawn[max(range(5), key=given.__getitem__)].tokens
    (alone,) = engine.generate(prompts[1:], users[1:], max_new_tokens=6, seed=[3 * 1_000_003 + 1])
    assert alone.tokens == answers[1].tokens
