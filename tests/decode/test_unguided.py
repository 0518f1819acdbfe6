"""A policy by itself: the greedy answers and samples of transformers, whichever path computes them."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import reward_model, tiny_lm
from decoding import USERS, Words, alike, chosen, engine_of, prompts, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from pyargs.decode.engine import Engine
from pyargs.errors import PyargsError
from pyargs.lm.loading import load_lm
from pyargs.ops.library import has_extension

native = pytest.mark.skipif(not has_extension, reason="no extension")
BACKENDS = [pytest.param("cpu", marks=native), "eager"]


@native
@settings(max_examples=40, deadline=None)
@given(
    family=st.sampled_from(["llama", "qwen2"]),
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=5),
    new=st.integers(1, 7),
    stop=st.sampled_from([None, 1, [1, 5, 9, 20, 33, 40, 41]]),
    seed=st.integers(0, 20),
)
def test_greedy_is_that_of_transformers(family, lengths, new, stop, seed):
    policy, rows = tiny_lm(family, seed=seed, dtype=torch.float32), alike(lengths, seed)
    policy.generation_config.eos_token_id = stop
    ours, theirs = (chosen(policy, None, rows, backend=backend, max_new_tokens=new) for backend in ("cpu", "eager"))
    assert ours == theirs
    greedy = policy.generate(torch.tensor([rows[0]]), max_new_tokens=new, do_sample=False)
    assert ours[0].tokens == greedy[0, len(rows[0]) :].tolist()


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_is_args_at_weight_0(dtype):
    policy, rows = tiny_lm(dtype=dtype, seed=3), prompts([4, 7, 2])
    guided = chosen(policy, reward_model(policy), rows, USERS, reward_weight=0.0, max_new_tokens=20)
    assert tokens(chosen(policy, None, rows, max_new_tokens=20)) == tokens(guided)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_that_the_tokenizer_has_not_are_never_chosen(backend):
    policy, rows = tiny_lm(dtype=torch.float32, seed=2), prompts([4, 7])
    most = max(map(max, tokens(chosen(policy, None, rows, backend=backend, max_new_tokens=20, stop=[]))))
    policy.tokenizer = Words(most)  # the largest that was chosen is no token now
    for temperature in (0.0, 2.0):
        found = chosen(policy, None, rows, backend=backend, max_new_tokens=20, stop=[], temperature=temperature)
        assert max(map(max, tokens(found))) < most


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_policy_that_can_not_answer_says_so(backend):
    policy = tiny_lm(dtype=torch.float32)
    engine = Engine(policy, backend=backend)
    for prompt, new, message in [
        ([], 2, "without a token"),
        ([5], 0, "at least 1, got 0"),
        ([5], -3, "at least 1"),
        ([5] * 120, 9, "120 prompt . 9 new tokens exceed the 128 positions of LlamaForCausalLM"),
        ([5, 61], 2, "must be a whole number, 0 to 60, got 61"),
    ]:
        with pytest.raises(PyargsError, match=message):
            engine.generate([[5], prompt], max_new_tokens=new)
        assert not engine.busy
    broken = tiny_lm(dtype=torch.float32)
    broken.lm_head.weight.data[:] = float("nan")
    for temperature in (0.0, 1.0):
        with pytest.raises(PyargsError, match=r"not numbers in row\(s\) \[0\]"):
            Engine(broken, backend=backend).generate([[5], [6]], max_new_tokens=2, temperature=temperature)


WRONG = {
    "seed": [1.5, "1", True, [1, 2], 2**64, np.array([1, 2])],
    "temperature": [-1, True, None, "1", float("inf"), float("nan")],
    "top_p": [0, 1.5, None, True],
    "min_p": [-0.5, 1.5, None],
    "stop": [2.5, True, "2", [3, None], [3, -1], -1],
    "reward_weight": [0.0, 1.0],
    "strength": [0.0, 1.0],
    "num_candidates": [1, 10, "all"],
    "a token id": [[[5, -1]], [[5, 61]], [[5.0]], [["a"]], [[True]], [{"role": 5}]],
    "a prompt is a str, messages, or a list": [[5, 6], [None], [object()]],
    "prompts is a list": ["ab", b"ab", None, 5],
    "without a tokenizer": [["a"], [[{"role": "user", "content": "a"}]]],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_refused_by_name(name):
    engine = Engine(tiny_lm())
    for value in WRONG[name]:
        named = {"max_new_tokens": 2, name: value} if " " not in name else {"max_new_tokens": 2}
        with pytest.raises(PyargsError, match=name):
            engine.generate([[5, 6]] if " " not in name else value, **named)
            pytest.fail(f"{name}={value!r} was accepted")


def test_sampling_at_a_temperature_near_zero_is_the_greedy_choice():
    engine, rows = Engine(tiny_lm()), [torch.tensor([5, 6]), np.array([7]), (8, 9)]
    greedy = [one.tokens for one in engine.generate(rows, max_new_tokens=4)]
    for temperature in (1e-300, 5e-324, np.float32(1e-45), Fraction(1, 10**30)):
        assert [one.tokens for one in engine.generate(rows, max_new_tokens=4, temperature=temperature)] == greedy


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_follow_the_policys_distribution(backend):
    """Of the whole vocabulary, and of what top_p leaves."""
    policy, n = tiny_lm(dtype=torch.float32), 2000
    engine = Engine(policy, backend=backend, max_rows=50)
    policy_says = (policy(torch.tensor([[5, 6, 7]])).logits[0, -1].double() / 1.5).softmax(-1)
    before = policy(torch.tensor([[5, 6, 7]])).logits[0, -1].double().softmax(-1).sort(descending=True)
    likely = before.indices[before.values.cumsum(0) - before.values < 0.6]
    for top_p in (1.0, 0.6):
        drawn = engine.generate([[5, 6, 7]] * n, max_new_tokens=1, temperature=1.5, top_p=top_p, seed=0, stop=[])
        expected = policy_says if top_p == 1 else torch.zeros_like(policy_says).index_copy(0, likely, policy_says[likely])
        expected = expected / expected.sum()
        count = torch.bincount(torch.tensor([one.tokens[0] for one in drawn]), minlength=61).double() / n
        assert ((count - expected).abs() <= 4.5 * (expected * (1 - expected) / n).sqrt() + 1e-3).all()


def test_the_checkpoints_own_settings_are_ignored(lm_folder):
    policy, tokenizer = load_lm(lm_folder)
    rows = [[5, 6, 7], [8, 9, 10, 11, 12]]
    before = chosen(policy, None, rows, max_new_tokens=8)
    policy.generation_config.repetition_penalty, policy.generation_config.do_sample = 5.0, True
    assert chosen(policy, None, rows, max_new_tokens=8) == before
    text = list(rows[0])
    for token in before[0].tokens:
        assert policy(torch.tensor([text])).logits[0, -1].argmax().item() == token
        text.append(token)
    one, two = (chosen(policy, None, rows, max_new_tokens=8, temperature=1.0, seed=s) for s in (1, 1))
    assert one == two
    assert Engine(policy).generate([], max_new_tokens=8) == []


def test_rows_of_the_logits_that_are_no_tokens_are_never_drawn(lm_folder):
    policy, tokenizer = load_lm(lm_folder)
    policy.resize_token_embeddings(len(tokenizer) + 64)
    policy.get_output_embeddings().weight.data[-64:] = 3 * policy.get_output_embeddings().weight.data[:64]
    drawn = engine_of(policy, max_rows=64).generate([[5, 6, 7]] * 64, max_new_tokens=4, temperature=1.0, seed=0)
    assert max(token for one in drawn for token in one.tokens) < len(tokenizer)
