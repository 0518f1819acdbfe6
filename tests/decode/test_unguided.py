"""A policy by itself: the greedy answers and samples of transformers, whichever path computes them."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import reward_model, tiny_lm
from decoding import USERS, alike, decoded, prompts, same
from hypothesis import given, settings
from hypothesis import strategies as st

from pyargs.decode import unguided
from pyargs.decode.backends import cpu
from pyargs.errors import PyargsError
from pyargs.lm.loading import load_lm
from pyargs.ops.library import has_extension

native = pytest.mark.skipif(not has_extension, reason="no extension")


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
    ours = unguided.generate(policy, rows, max_new_tokens=new)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "possible", lambda *models: False)
        theirs = unguided.generate(policy, rows, max_new_tokens=new)
    same(ours, theirs)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_is_args_at_weight_0(dtype):
    policy, rows = tiny_lm(dtype=dtype, seed=3), prompts([4, 7, 2])
    model = reward_model(policy)
    guided = decoded(policy, model, rows, USERS, reward_weight=0.0, max_new_tokens=20)
    assert unguided.generate(policy, rows, max_new_tokens=20).tokens.tolist() == guided.tokens.tolist()


@native
def test_tokens_that_the_tokenizer_has_not_are_never_chosen():
    policy = tiny_lm(dtype=torch.float32, seed=2)
    rows = prompts([4, 7])
    policy.generation_config.eos_token_id = None
    free = unguided.generate(policy, rows, max_new_tokens=20).tokens
    policy.tokenizer = range(int(free.max()))  # the largest that was chosen is no token now
    for possible in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "possible", lambda *models, possible=possible: possible)
            assert unguided.generate(policy, rows, max_new_tokens=20).tokens.max() < free.max()


@native
@pytest.mark.parametrize("possible", [True, False])
def test_a_policy_that_can_not_answer_says_so(possible, monkeypatch):
    policy = tiny_lm(dtype=torch.float32)
    if not possible:
        monkeypatch.setattr(cpu, "possible", lambda *models: False)
    for prompt, new, message in [
        ([], 2, "without a token"),
        ([5], 0, "at least 1, got 0"),
        ([5], -3, "at least 1"),
        ([5] * 120, 9, "120 prompt . 9 new tokens exceed the 128 positions of LlamaForCausalLM"),
    ]:
        with pytest.raises(PyargsError, match=message):
            unguided.generate(policy, [[5], prompt], max_new_tokens=new)
    with pytest.raises(PyargsError, match="must be a whole number, 0 to 60, got 61"):
        unguided.generate(policy, [[5, 61]], max_new_tokens=2)
    broken = tiny_lm(dtype=torch.float32)  # not one that was found to be whole before
    broken.lm_head.weight.data[:] = float("nan")
    with pytest.raises(PyargsError, match=r"not numbers in row\(s\) \[0, 1\]"):
        unguided.generate(broken, [[5], [6]], max_new_tokens=2)


PLAIN = {
    "seed": [1.5, "1", True, [1, 2], 2**64, np.array([1, 2])],
    "do_sample": ["False", 1, None],
    "temperature": [0, True, None],
    "a token of a prompt": [[[5, -1]], [[5, 61]], [[5.0]], [["a"]], [[True]], "ab", [[None]]],
    "prompts are lists of token ids": [None, 5, [5, 6], [None]],
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_decoding_refuses_wrong_values_by_name(name):
    policy = tiny_lm()
    for value in PLAIN[name]:
        more = {name: value} if name in ("seed", "do_sample", "temperature") else {"prompts": value}
        with pytest.raises(PyargsError, match=name):
            unguided.generate(policy, **({"prompts": [[5, 6]], "max_new_tokens": 2, "do_sample": True} | more))
            pytest.fail(f"{name}={value!r} was accepted")


def test_plain_sampling_at_a_temperature_near_zero_is_the_greedy_choice():
    policy, rows = tiny_lm(), [torch.tensor([5, 6]), np.array([7]), (8, 9)]
    greedy = unguided.generate(policy, rows, max_new_tokens=4)
    for temperature in (1e-300, 5e-324, np.float32(1e-45), Fraction(1, 10**30)):
        sampled = unguided.generate(policy, rows, max_new_tokens=4, do_sample=True, temperature=temperature)
        assert torch.equal(sampled.tokens, greedy.tokens)


def test_plain_decoding_ignores_the_checkpoints_own_settings(lm_folder):
    from pyargs.decode import unguided

    policy, tokenizer = load_lm(lm_folder)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    before = unguided.generate(policy, prompts, max_new_tokens=8)
    policy.generation_config.repetition_penalty, policy.generation_config.do_sample = 5.0, True
    assert torch.equal(unguided.generate(policy, prompts, max_new_tokens=8).tokens, before.tokens)
    ids = torch.tensor([prompts[0]])
    for token in before.answers()[0]:
        assert policy(ids).logits[0, -1].argmax().item() == token
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    one, two = (unguided.generate(policy, prompts, max_new_tokens=8, do_sample=True, seed=s).tokens for s in (1, 1))
    assert torch.equal(one, two)
    assert unguided.generate(policy, [], max_new_tokens=8).tokens.shape[0] == 0


def test_rows_of_the_logits_that_are_no_tokens_are_never_drawn(lm_folder):
    from pyargs.decode import unguided

    policy, tokenizer = load_lm(lm_folder)
    policy.resize_token_embeddings(len(tokenizer) + 64)
    policy.get_output_embeddings().weight.data[-64:] = 3 * policy.get_output_embeddings().weight.data[:64]
    drawn = unguided.generate(policy, [[5, 6, 7]] * 64, max_new_tokens=4, do_sample=True, seed=0).tokens
    assert drawn.max() < len(tokenizer)
