"""The plain loop: the definition, written out; k copies of a cache where candidates can not share one."""

from __future__ import annotations

import pytest
import torch
from conftest import FULL_ATTENTION, OTHER_LAYERS, reward_model, tiny_lm
from decoding import USERS, batches, by_reference, chosen, engine_of, prompts, same, steps_of, without_cache
from families import SIZES, VOCABULARY
from hypothesis import given, settings

from pyargs.decode import reference
from pyargs.decode.engine import Engine
from pyargs.errors import PyargsError


@pytest.mark.parametrize("family", FULL_ATTENTION + OTHER_LAYERS)
@pytest.mark.parametrize("decoder", [chosen, by_reference])
@pytest.mark.parametrize("eos_reward", ["before", "state"])
def test_decoders_follow_the_definition(family, decoder, eos_reward):
    policy, model = tiny_lm(family), reward_model(tiny_lm(family, seed=5))
    stop = list(range(1, 61, 8))
    for seed, length in enumerate([4] if family == "mamba" else [1, 4, 9]):  # mamba without its kernels is slow
        (prompt,) = prompts([length], seed)
        expected, rewards = without_cache(policy, model, prompt, "bob", 2.0, 5, 6, eos_reward, stop)
        more = dict(reward_weight=2.0, max_new_tokens=6, eos_reward=eos_reward, stop=stop)
        (got,) = decoder(policy, model, [prompt], ["bob"], **more)
        assert got.tokens == expected
        torch.testing.assert_close(torch.tensor(got.rewards), torch.tensor(rewards), atol=2e-5, rtol=2e-5)


@settings(max_examples=25, deadline=None)
@given(asked=batches())
def test_shared_prefix_equals_k_copies(asked):
    *batch, wish = asked
    same(chosen(*batch, backend="eager", **wish), by_reference(*batch, **wish))


@pytest.mark.parametrize("family", OTHER_LAYERS)
def test_layers_that_cannot_branch_take_the_copies_with_one_warning(family):
    policy, model = tiny_lm(family), reward_model(tiny_lm(family, seed=3))
    with pytest.warns(UserWarning, match="copies") as caught:
        engine = Engine(policy, model)
    assert len([w for w in caught if "copies" in str(w.message)]) == 1
    same(steps_of(engine, prompts([4]), ["ann"]), by_reference(policy, model, prompts([4]), ["ann"]))


def test_caches_of_a_models_own_are_refused_where_rows_must_be_copied():
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    config = MiniMaxConfig(**SIZES | dict(sliding_window=None), vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1)
    config._experts_implementation = "eager"
    lm = MiniMaxForCausalLM(config).eval()
    for decoder in (by_reference, chosen):
        with pytest.raises(PyargsError, match="MiniMaxCache"):
            decoder(lm, reward_model(lm), prompts([2, 7, 4]), USERS, num_candidates=3)


def test_no_request_is_no_answer():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    assert reference.answers(policy, model, []) == [] and engine_of(policy, model).generate([]) == []
