"""What is asked of a decoder is checked by value and by type: refused by the argument's name, or done."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import reward_model, tiny_lm
from decoding import USERS, Words, by_reference, chosen, engine_of, prompts, tokens
from families import random_lm
from hypothesis import given
from hypothesis import strategies as st

from pyargs.decode.engine import Engine
from pyargs.decode.request import Request, integer, noise, numbered, seeds
from pyargs.errors import PyargsError, UnknownUser

INF, NAN = math.inf, math.nan
IDS = [[5, 6], [7, 8, 9]]


@pytest.fixture(scope="module")
def engine():
    return engine_of(tiny_lm(), reward_model(tiny_lm(seed=3)))


def ask(engine, users=("ann", "bob"), **wish):
    return engine.generate(IDS, users, **(dict(reward_weight=1.0, num_candidates=5, max_new_tokens=2, seed=0, stop=[]) | wish))


WRONG = {
    "reward_weight": [INF, NAN, 3.5e38, True, [True, False], "strong", [1.0, None], 1j, [1.0, 2.0, 3.0], [[1.0, 2.0]],
        torch.tensor([1.0, NAN])],
    "num_candidates": [0, -1, 65, 62, 2.5, 2.0, True, "5", [5], np.float64(5), torch.tensor([5, 5])],
    "max_new_tokens": [0, -3, 2.5, 2.0, True, None, "4", np.float32(4), torch.tensor(4.0)],
    "seed": [2**64, -(2**63) - 1, 1.0, True, "7", [1], [1, 2, 3], [1, 2.5], [1, True], np.array([0.5, 1.0])],
    "stop": [2.5, True, "2", [3, None], [3, -1], -1],
    "temperature": [-1, INF, NAN, True, "1", None, 1j],
    "top_p": [0, -0.1, 1.1, INF, NAN, True, "1", None],
    "reward_clip": [0, -1.0, INF, NAN, True, "1", [1.0]],
    "min_p": [-0.1, 1.1, INF, NAN, True, "0", None],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_refused_by_name(engine, name):
    for value in WRONG[name]:
        with pytest.raises(PyargsError, match=name):
            ask(engine, **{name: value})
            pytest.fail(f"{name}={value!r} was accepted")
        assert not engine.busy


def test_strength_is_a_weight_in_another_unit(engine, monkeypatch):
    monkeypatch.setattr(engine.pair, "unit", lambda: 0.25)
    for value in WRONG["reward_weight"]:
        with pytest.raises(PyargsError, match="strength"):
            ask(engine, reward_weight=None, strength=value)
    got = ask(engine, reward_weight=None, strength=[0.5, 0.0])
    assert [one.reward_weight for one in got] == [2.0, 0.0]
    assert [one.tokens for one in got] == [one.tokens for one in ask(engine, reward_weight=[2.0, 0.0])]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(eos_reward="none"), "eos_reward"),
        (dict(eos_reward=["before"]), "eos_reward"),
        (dict(max_rows=0), "max_rows"),
        (dict(max_rows=2.0), "max_rows"),
        (dict(backend="fast"), "backend"),
    ],
)
def test_an_engine_that_can_not_be_is_refused_by_name(how, message):
    with pytest.raises(PyargsError, match=message):
        Engine(tiny_lm(), reward_model(tiny_lm(seed=3)), **how)


def test_numbers_of_numpy_and_torch_are_welcome(engine):
    got = ask(
        engine,
        num_candidates=np.int32(4),
        max_new_tokens=torch.tensor(3),
        seed=np.array([3, 2**63], dtype=np.uint64),
        stop=np.int64(7),
        reward_weight=np.array([0.5, 2], dtype=np.float16),
        temperature=np.float32(0.5),
        top_p=np.float32(1),
        min_p=Fraction(1, 10**9),
    )
    assert [one.reward_weight for one in got] == [0.5, 2.0] and [one.seed for one in got] == [3, 2**63]
    for weight in (2, np.float64(2), torch.tensor(2), torch.tensor([2.0]), [2, 2.0], (np.int64(2), 2)):
        assert [one.reward_weight for one in ask(engine, reward_weight=weight)] == [2.0, 2.0]
    for stop in (torch.tensor([7, 8]), np.array([7, 8]), (7, 8)):
        assert engine.pair.request([5], "ann", reward_weight=1.0, stop=stop).stop == (7, 8)
    assert engine.pair.request([5], "ann", reward_weight=1.0).stop == (1,)  # the policy's own


@given(value=st.one_of(st.integers(), st.floats(), st.booleans(), st.text(max_size=2), st.none(), st.binary(max_size=2)))
def test_whole_numbers_are_themselves_or_refused(value):
    """500 values of a dozen types: an int within the bounds comes back, and all else is one PyargsError."""
    fits = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 64
    if fits:
        assert integer("k", value, 1, 64) == value and seeds(value, 3) == value
    else:
        with pytest.raises(PyargsError, match="k must be a whole number, 1 to 64, got"):
            integer("k", value, 1, 64)


def test_seeds_of_many_prompts_stay_within_torch():
    for seed in (0, 7, 2**60, 2**64 - 1, -5):
        assert torch.Generator().manual_seed(numbered(seed, 10**6)).initial_seed() == numbered(seed, 10**6)
    assert numbered(7, 3) == 7_000_024


@given(st.integers(-(2**63), 2**64 - 1), st.integers(1, 9), st.integers(0, 5))
def test_noise_is_the_requests_own(seed, new, more):
    """However many steps others take, the first are the same; a greedy request draws none."""
    one = Request((5,), temperature=1.0, max_new_tokens=new, seed=seed)
    drawn = noise(one, new + more)
    assert torch.equal(drawn[:new], noise(one, new)) and not drawn[new:].any()
    assert not noise(Request((5,), max_new_tokens=new, seed=seed), new).any()


def test_wrong_requests_say_how_to_mend_them(engine):
    for wish, message in [
        (dict(reward_weight=[1.0, 2.0, 3.0]), "3 values for 2 rows"),
        (dict(reward_weight=float("inf")), "finite"),
        (dict(max_new_tokens=500), "positions"),
        (dict(num_candidates="all"), "only a TokenReward"),
        (dict(users=["ann"]), "2 prompts but 1 users: name one user for each"),
        (dict(strength=1.0), "give one of them"),
        (dict(reward_weight=None), "no reward_std.*give reward_weight"),
    ]:
        with pytest.raises(PyargsError, match=message):
            ask(engine, **wish)
    with pytest.raises(UnknownUser, match="Did you mean: ann"):
        ask(engine, ["anne", "bob"])


def test_rows_of_the_embedding_beyond_the_tokenizer_are_never_chosen():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    model.tokenizer = Words(20)
    policy.lm_head.weight.data[20:] *= 50  # the padding rows would win nearly always
    for decoder in (chosen, by_reference):
        got = decoder(policy, model, prompts([4, 2], vocab=20), USERS[:2], tokenizer=Words(20), stop=[])
        assert max(map(max, tokens(got))) < 20


def test_tokenizers_are_compared_by_their_ids():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    model.tokenizer = Words(30)
    Engine(policy, model, tokenizer=Words(30))
    with pytest.raises(PyargsError, match="different tokenizers"):
        Engine(policy, model, tokenizer=Words(30, shift=1))


def test_a_policy_of_unknown_tokenizer_is_named():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    model.tokenizer = Words(30)
    policy.config._name_or_path = policy.name_or_path = "someone/else"
    with pytest.warns(UserWarning, match="pass tokenizer="):
        Engine(policy, model)
    policy.tokenizer = Words(30, shift=1)
    with pytest.raises(PyargsError, match="different tokenizers"):
        Engine(policy, model)


def test_a_reward_model_of_fewer_positions_is_refused():
    model = reward_model(random_lm("llama", 1))
    model.backbone.config.max_position_embeddings = 6
    engine = engine_of(random_lm("llama", 0), model)
    with pytest.raises(PyargsError, match="4 prompt . 5 new tokens exceed the 6 positions of LlamaModel"):
        engine.generate(prompts([4, 2]), ["ann"] * 2, reward_weight=1.0, max_new_tokens=5)


def test_what_the_policy_knows_and_the_reward_model_does_not():
    policy, model = tiny_lm(vocab=80), reward_model(tiny_lm(vocab=61))
    with pytest.raises(PyargsError, match=r"80 tokens.*knows 61.*tokenizer="):
        Engine(policy, model)
    engine = Engine(policy, model, tokenizer=Words(61))
    with pytest.raises(PyargsError, match="a token id must be a whole number, 0 to 60, got 70"):
        engine.submit([5, 70], "ann", reward_weight=1.0)
