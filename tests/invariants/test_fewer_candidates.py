"""Fewer candidates: what min_p and reward_clip leave out is not computed, and a skip changes no choice."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import reward_model, tiny_lm
from decoding import USERS, Words, by_reference, chosen, engine_of, pair_in_float32, prompts, same, shared_pair, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from pyargs.decode.backends import cpu, eager
from pyargs.decode.request import Request, bounds
from pyargs.errors import PyargsError
from pyargs.models.reward_model import RewardModel
from pyargs.models.token_reward import TokenReward
from pyargs.ops.choice import choose
from pyargs.ops.library import has_extension
from pyargs.ops.row_state import counts

BACKENDS = ["eager", pytest.param("cpu", marks=pytest.mark.skipif(not has_extension, reason="no extension"))]
FLOATS = dict(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=200, deadline=None)
@given(
    st.floats(-30, 0, **FLOATS),
    st.lists(st.sampled_from([0.0, 0.5, 0.95, 1 - 2**-20, 1.0, 1 + 2**-22, 1.01]), max_size=9),
    st.floats(-1e4, 1e4, **FLOATS) | st.sampled_from([0.0, 1e-38, 3e38]),
    st.floats(2**-10, 20, **FLOATS) | st.just(1e30),
    st.data(),
)
def test_a_candidate_that_is_skipped_could_not_have_won(first, gaps, weight, clip, data):
    """Also those about 2 c behind, when rewards lie at their bounds, so that rounding decides."""
    limit, gap = bounds(Request((1,), reward_weight=weight, reward_clip=clip))
    logprobs = torch.tensor([[first, *(first - 2 * clip * share for share in sorted(gaps))]])
    k, free = logprobs.shape[1], torch.ones(1, dtype=torch.float64)
    most = math.copysign(limit if math.isfinite(limit) else 9.0, weight)
    lower = data.draw(st.lists(st.sampled_from([most, 0.9 * most, -most]), min_size=k, max_size=k))
    rewards = torch.tensor([[-most, *lower[1:]]])
    kept = counts(logprobs, torch.tensor([k]), free, 0 * free, torch.tensor([gap]).double())
    how = torch.tensor([weight]), torch.arange(k).unsqueeze(0), torch.tensor([False])
    want, got = choose(logprobs, rewards, *how), choose(logprobs, rewards, *how, count=kept)
    assert got[:2] == want[:2] and 1 <= kept <= k
    if weight and 1e-30 < abs(weight) < 1e30:  # nothing is kept that is clearly too far behind
        behind = (logprobs[0, 0] - logprobs[0]).double()
        assert int(kept) <= int((behind <= 2 * clip * (1 + 1e-5)).sum())


@settings(max_examples=6, deadline=None)
@given(st.sampled_from(["own", "shared", "shared lora"]), st.sampled_from([0.05, 0.3, 1.0]), st.integers(0, 9))
def test_greedy_answers_are_those_of_clipped_rewards_with_all_candidates_tried(weights, clip, seed):
    """The plain loop tries all."""
    policy, model = shared_pair(weights, "linear", seed)
    wish = dict(reward_weight=[4.0, -2.0, 0.0], reward_clip=clip, num_candidates=9, stop=[7, 9, 11, 13, 20, 30, 40])
    found = chosen(policy, model, prompts([3, 6, 2]), USERS, **wish)
    same(found, by_reference(policy, model, prompts([3, 6, 2]), USERS, **wish))
    for one, weight in zip(found, wish["reward_weight"], strict=True):
        assert all(abs(weight * reward) <= clip * (1 + 1e-6) for reward in one.rewards)


def test_a_clip_matters_and_a_large_one_does_not():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    wish = dict(reward_weight=5.0, stop=[])
    free, *others = (
        tokens(chosen(policy, model, prompts([4, 2, 7]), USERS, reward_clip=clip, **wish)) for clip in (None, 1e4, 0.01)
    )
    assert others[0] == free != others[1]
    assert others[1] == tokens(chosen(policy, model, prompts([4, 2, 7]), USERS, **wish | {"reward_weight": 0.0}))


@pytest.mark.parametrize("step_reward", ["token", "prefix_mean"])
def test_means_over_the_answer_are_of_clipped_rewards(step_reward):
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3), head="mlp", pool="mean", step_reward=step_reward)
    wish = dict(reward_weight=20.0, reward_clip=0.5, max_new_tokens=9, stop=[3, 5, 9, 11, 20])
    same(
        chosen(policy, model, prompts([5, 3]), ["x", "x"], **wish),
        by_reference(policy, model, prompts([5, 3]), ["x", "x"], **wish),
    )


def branches(backend: str, patch) -> list[int]:
    """Of each later pass over candidates, how many of them the backend computes for the reward model."""
    found = []
    if backend == "cpu":
        inner = cpu._Rows.run

        def run(self, ids, mask=None, *, branches=False, **more):
            if branches:
                found.append(ids.numel() if mask is None else int(mask[-len(ids) :].sum()))
            return inner(self, ids, mask, branches=branches, **more)

        patch.setattr(cpu._Rows, "run", run)
    else:
        inner = eager._few

        def few(candidates, wanted):
            kept = inner(candidates, wanted)
            found.append(kept.numel())
            return kept

        patch.setattr(eager, "_few", few)
    return found


@pytest.mark.parametrize("wish", [dict(min_p=0.7), dict(top_p=0.2), dict(reward_clip=0.05)])
@pytest.mark.parametrize("weights", ["own", "shared", "shared lora"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_left_out_is_not_computed(backend, weights, wish, monkeypatch):
    """Of one row exactly; of several rows eager passes have as many of each as of the row that wants most."""
    policy, model = pair_in_float32(weights)
    engine = engine_of(policy, model, backend=backend)
    asked = dict(reward_weight=2.0, num_candidates=10, max_new_tokens=9, stop=[]) | wish
    passes = branches(backend, monkeypatch)
    for rows in (prompts([4]), prompts([4, 6, 3])):
        passes.clear()
        told = [one.told for one in engine.generate(rows, USERS[: len(rows)], logprobs=10, **asked)]
        left = torch.tensor([[sum(one.reward is not None for one in step.candidates) for step in row] for row in told])
        most = left.sum(0) if backend == "cpu" else left.amax(0) * len(rows)
        assert passes == most.tolist()
        assert 1 <= left.min() < 10
        passes.clear()
        engine.generate(rows, USERS[: len(rows)], **asked)
        assert passes == most.tolist()


def test_a_function_is_not_asked_for_what_is_left_out():
    policy, seen = tiny_lm(), []

    def length(ids, mask):
        seen.append(len(ids))
        return mask.sum(1) + torch.sin(ids[:, -1].double())

    model = RewardModel.from_function(length, Words(61))
    engine = engine_of(policy, model, tokenizer=Words(61))
    wish = dict(reward_weight=0.3, max_new_tokens=6, stop=[])
    (answer,) = engine.generate(prompts([4]), logprobs=10, min_p=0.7, **wish)
    left = [sum(one.reward is not None for one in step.candidates) for step in answer.told]
    assert min(left) < 10 and sum(seen) - 1 == sum(left)  # and the prompt


def test_samples_try_all_candidates():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    wish = dict(reward_weight=5.0, reward_clip=0.01, temperature=3.0, num_candidates=10, max_new_tokens=30, stop=[])
    (got,) = chosen(policy, model, prompts([4]), ["ann"], **wish)
    same([got], by_reference(policy, model, prompts([4]), ["ann"], **wish))
    assert max(got.slots) > 7


def test_rules_without_rewards_of_candidates_refuse_a_clip_by_name():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    token_reward = TokenReward(tiny_lm(seed=3), None)
    for engine, user, more in [
        (engine_of(policy), "", {}),
        (engine_of(policy, token_reward), "", {"reward_weight": 1.0}),
        (engine_of(policy, model, best_of=2), "ann", {}),
    ]:
        with pytest.raises(PyargsError, match="reward_clip is for a RewardModel"):
            engine.submit([3, 4], user, reward_clip=1.0, **more)
