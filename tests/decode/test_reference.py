"""The plain loop: the definition, written out; k copies of a cache where candidates can not share one."""

from __future__ import annotations

import pytest
import torch
from conftest import FULL_ATTENTION, OTHER_LAYERS, reward_model, tiny_lm
from decoding import USERS, arguments, guided, plain, prompts, requests, same, without_cache
from families import SIZES, VOCABULARY
from hypothesis import given, settings

import pyargs
from pyargs.errors import PyargsError
from pyargs.lm.tokenize import left_pad


@pytest.mark.parametrize("family", FULL_ATTENTION + OTHER_LAYERS)
@pytest.mark.parametrize("decoder", [guided, plain])
def test_decoders_follow_the_definition(family, decoder):
    policy, model = tiny_lm(family), reward_model(tiny_lm(family, seed=5))
    for seed, length in enumerate([4] if family == "mamba" else [1, 4, 9]):  # mamba without its kernels is slow
        (prompt,) = prompts([length], seed)
        expected, rewards = without_cache(policy, model, prompt, "bob", 2.0, 5, 6)
        got = decoder(policy, model, [prompt], ["bob"], reward_weight=2.0, max_new_tokens=6)
        assert got.tokens[0].tolist() == expected
        torch.testing.assert_close(got.rewards[0], torch.tensor(rewards), atol=2e-5, rtol=2e-5)


@settings(max_examples=25, deadline=None)
@given(request=requests())
def test_shared_prefix_equals_k_copies(request):
    *batch, changes = request
    same(guided(*batch, **changes), plain(*batch, **changes))


@pytest.mark.parametrize("family", OTHER_LAYERS)
def test_layers_that_cannot_branch_take_the_copies_with_one_warning(family):
    policy, model = tiny_lm(family), reward_model(tiny_lm(family, seed=3))
    ids, mask = left_pad(prompts([4]), pad_id=1)
    with pytest.warns(UserWarning, match="copies") as caught:
        got = pyargs.generate(policy, model, ids, mask, ["ann"], **arguments())
    assert len([w for w in caught if "copies" in str(w.message)]) == 1
    same(got, plain(policy, model, prompts([4]), ["ann"]))


def test_caches_of_a_models_own_are_refused_where_rows_must_be_copied():
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    config = MiniMaxConfig(**SIZES | dict(sliding_window=None), vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1)
    config._experts_implementation = "eager"
    lm = MiniMaxForCausalLM(config).eval()
    with pytest.raises(PyargsError, match="MiniMaxCache"):
        plain(lm, reward_model(lm), prompts([2, 7, 4]), USERS, num_candidates=3)
