"""What is told of each token beside it: the policy's log-probs and the rewards of its candidates, and nothing else changes."""

from __future__ import annotations

import math

import pytest
import torch
from company import check_company, play, wishes
from conftest import tiny_lm
from decoding import USERS, pair_in_float32, prompts, shared_pair
from hypothesis import given, settings
from hypothesis import strategies as st

from pyargs.decode.engine import Engine
from pyargs.errors import PyargsError
from pyargs.models.token_reward import TokenReward


def check_told(answer, policy, prompt, asked: int, guided: bool = True) -> None:
    """The log-probs are those of a pass over the whole text; the chosen one's reward stands beside its candidate."""
    texts = torch.tensor([prompt + answer.tokens])
    logits = policy(texts).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    assert len(answer.told) == len(answer.tokens)
    for step, (told, token, slot, reward) in enumerate(
        zip(answer.told, answer.tokens, answer.slots, answer.rewards, strict=True)
    ):
        want = logits[step]
        assert told.logprob == pytest.approx(want[token].item(), abs=2e-4)
        assert len(told.candidates) == asked
        assert [one.logprob for one in told.candidates] == pytest.approx(want.topk(asked).values.tolist(), abs=2e-4)
        for one in told.candidates:
            assert one.logprob == pytest.approx(want[one.token].item(), abs=2e-4)
        if guided and slot < asked:
            assert told.candidates[slot].token == token and told.candidates[slot].reward == pytest.approx(reward, abs=1e-5)
        elif not guided:
            assert all(one.reward is None for one in told.candidates)


@settings(max_examples=15, deadline=None)
@given(wishes(), st.sampled_from(["own", "shared", "shared lora"]), st.integers(1, 4), st.data())
def test_answers_are_those_that_are_not_told_of_in_any_company(requests, weights, room, data):
    policy, model = pair_in_float32(weights)
    asked = [data.draw(st.sampled_from([0, 1, 4, 20])) for _ in requests]
    telling = [(*one[:2], one[2] | {"logprobs": n}, *one[3:]) for one, n in zip(requests, asked, strict=True)]
    make = lambda room: Engine(policy, model, max_rows=room, backend="cpu")  # noqa: E731
    check_company(make, telling, room, exact=True)
    for want, got, n, (prompt, *_) in zip(play(make(room), requests), play(make(room), telling), asked, requests, strict=True):
        assert (want.tokens, want.rewards, want.slots, want.spreads) == (got.tokens, got.rewards, got.slots, got.spreads)
        assert (got.told is None) == (n == 0)
        if n:
            check_told(got, policy, prompt, n)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("kind", ["head", "token reward", "alone"])
def test_every_kind_tells(backend, kind):
    if kind == "head":
        policy, model = pair_in_float32("shared") if backend == "cpu" else shared_pair("own", "mlp", 0)
    else:
        policy = tiny_lm(dtype=torch.float32)
        model = TokenReward(tiny_lm(seed=3, dtype=torch.float32), None) if kind == "token reward" else None
    rows, more = prompts([3, 6, 2]), {} if model is None else {"reward_weight": 2.0, "num_candidates": 5}
    engine = Engine(policy, model, backend=backend)
    for wish in ({}, {"temperature": 1.0, "seed": [1, 2, 3]}, {"min_p": 0.3}):
        users = USERS if kind == "head" else None
        want = engine.generate(rows, users, max_new_tokens=7, stop=[], **wish, **more)
        answers = engine.generate(rows, users, max_new_tokens=7, stop=[], logprobs=8, **wish, **more)
        for answer, plain, row in zip(answers, want, rows, strict=True):
            assert answer.tokens == plain.tokens and plain.told is None
            check_told(answer, policy, row, 8, guided=kind != "alone")
            if kind == "head":  # behind the row's own candidates there is no reward
                assert all(one.reward is None for told in answer.told for one in told.candidates[5:])


def test_the_choice_follows_from_what_is_told():
    policy, model = pair_in_float32("own")
    wish = dict(reward_weight=3.0, logprobs=10, max_new_tokens=9, stop=[])
    (answer,) = Engine(policy, model).generate(prompts([5]), ["ann"], **wish)
    for token, told in zip(answer.tokens, answer.told, strict=True):
        assert max(told.candidates, key=lambda one: one.logprob + 3.0 * one.reward).token == token


def test_an_event_tells_of_the_stop_token_too():
    policy, model = pair_in_float32("own")
    engine = Engine(policy, model)
    (first,) = engine.generate(prompts([4]), ["ann"], reward_weight=1.0, max_new_tokens=1, stop=[])
    engine.submit(prompts([4])[0], "ann", reward_weight=1.0, stop=first.tokens, logprobs=2)
    (event,) = engine.step()
    assert event.token == first.tokens[0] and event.answer.told == [] and len(event.told.candidates) == 2
    assert not math.isnan(event.told.logprob)


def test_what_cannot_be_told_is_refused():
    policy, model = pair_in_float32("own")
    for wrong in (-1, 65, 1.5, True):
        with pytest.raises(PyargsError, match="logprobs"):
            Engine(policy, model).submit([3, 4], "ann", reward_weight=1.0, logprobs=wrong)
    with pytest.raises(PyargsError, match="logprobs"):
        Engine(policy, model, best_of=2).submit([3, 4], "ann", logprobs=3)
