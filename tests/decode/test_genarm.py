"""GenARM's decoder against its formula, and its own sampling."""

from __future__ import annotations

import pytest
import torch
from small import config_of

from pyargs.decode.engine import Engine
from pyargs.errors import PyargsError
from pyargs.lm.loading import load_lm
from pyargs.models.token_reward import TokenReward
from pyargs.ops.library import has_extension
from pyargs.training import trainer

BACKENDS = ["cpu", "eager"] if has_extension else ["eager"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [5, "all"])
def test_tokenwise_decoding_against_its_formula(lm_folder, rows, k, backend):
    policy, _ = load_lm(lm_folder)
    model = trainer.train("genarm", rows, config_of("genarm", lm_folder))
    engine, prompts, weights = Engine(policy, model, backend=backend), [[5, 6, 7], [8, 9, 10, 11, 12]], [0.0, 1.5]
    answers = engine.generate(prompts, reward_weight=weights, num_candidates=k, max_new_tokens=6)
    for prompt, weight, answer in zip(prompts, weights, answers, strict=True):
        for n, (token, slot, reward) in enumerate(zip(answer.tokens, answer.slots, answer.rewards, strict=True)):
            context = torch.tensor([prompt + answer.tokens[:n]])
            logs = policy(context).logits[0, -1].log_softmax(-1)
            rewards = model.lm(context).logits[0, -1].log_softmax(-1)
            candidates = logs.topk(len(logs) if k == "all" else k).indices
            best = candidates[(logs + weight * rewards)[candidates].argmax()]
            assert token == best.item() and reward == pytest.approx(rewards[token].item(), abs=1e-3)
            assert candidates[slot] == token
    # sampling: seeded by row, the same alone
    wish = dict(num_candidates=k, max_new_tokens=6, temperature=1.0, reward_weight=1.0)
    drawn = lambda some, seed: [one.tokens for one in engine.generate(some, seed=seed, **wish)]  # noqa: E731
    both = drawn(prompts, [3, 4])
    assert both[1:] == drawn(prompts[1:], [4]) and both == drawn(prompts, [3, 4])


def test_genarms_own_sampling_follows_its_distribution(lm_folder, rows):
    policy, _ = load_lm(lm_folder)
    model = trainer.train("genarm", rows, config_of("genarm", lm_folder))
    n, prompt = 4000, [5, 6, 7]
    engine = Engine(policy, model, max_rows=50, backend="eager")
    wish = dict(num_candidates="all", temperature=1.0, reward_weight=1.0, max_new_tokens=1, seed=0)
    drawn = engine.generate([prompt] * n, **wish)
    (stop,) = engine.pair.request(prompt, "", reward_weight=0.0).stop
    first = torch.tensor([one.tokens[0] if one.tokens else stop for one in drawn])
    ids = torch.tensor([prompt])
    logs = policy(ids).logits[0, -1].log_softmax(-1) + model.lm(ids).logits[0, -1].log_softmax(-1)
    expected = logs.softmax(-1)[: len(model.tokenizer)]
    count = torch.bincount(first, minlength=len(expected)).float()
    # a stop token is drawn like any other
    assert ((count / n - expected).abs() < 4 * (expected * (1 - expected) / n).sqrt() + 1e-3).all()


@pytest.mark.parametrize("users", [None, ["ann", "bob"]])
def test_users_need_not_be_known(lm_folder, users):
    policy, tokenizer = load_lm(lm_folder)
    engine = Engine(policy, TokenReward(*load_lm(lm_folder)))
    answers = engine.generate([[5, 6], [7]], users, reward_weight=1.0, max_new_tokens=2)
    assert [one.user for one in answers] == (users or ["", ""])


def test_an_output_layer_that_is_too_small_is_refused(lm_folder):
    policy, tokenizer = load_lm(lm_folder)
    lm, _ = load_lm(lm_folder)
    lm.set_output_embeddings(torch.nn.Linear(lm.config.hidden_size, len(tokenizer) - 1, bias=False))
    with pytest.raises(PyargsError, match="output layer has fewer rows"):
        Engine(policy, TokenReward(lm, tokenizer))
