"""Packed passes; padding that counts and lengths that change a model are refused."""

from __future__ import annotations

import pytest
import torch
from conftest import reward_model, tiny_lm
from decoding import USERS, guided, prompts, tokenwise
from families import random_lm

from pyargs.decode import unguided
from pyargs.errors import PyargsError
from pyargs.lm.forward import packed_states, spans
from pyargs.lm.tokenize import pack
from pyargs.models.token_reward import TokenReward
from pyargs.scoring import response_states


@pytest.mark.parametrize("lengths", [(2, 14), (10, 10), (2, 10)])
def test_longrope_across_its_border_is_refused(lengths):
    policy, rows = random_lm("phi3 longrope", 0), prompts(lengths)
    model = reward_model(random_lm("phi3 longrope", 1))
    with pytest.raises(PyargsError, match="more than 12 tokens"):
        guided(policy, model, rows, ["ann"] * 2, num_candidates=3, max_new_tokens=4)
    with pytest.raises(PyargsError, match="more than 12 tokens"):
        unguided.generate(policy, rows, max_new_tokens=4)
    with pytest.raises(PyargsError, match="more than 12 tokens"):
        tokenwise(policy, TokenReward(policy, None), rows, max_new_tokens=4)
    with pytest.raises(PyargsError, match="more than 12 tokens"):
        response_states(policy.get_decoder(), [(rows[0], [[3], [4] * 12])])


def test_a_model_that_padding_changes_is_refused_where_there_is_padding():
    from transformers import LlamaForCausalLM

    class Blind(LlamaForCausalLM):
        def forward(self, input_ids, cache=None, use_cache=None):
            return super().forward(input_ids=input_ids, cache=cache, use_cache=use_cache)

    config = random_lm("llama", 0).config
    torch.manual_seed(0)
    lm = Blind(config).double().eval()  # in float64, which the native stack leaves alone
    model, rows = reward_model(random_lm("llama", 1)), prompts([3, 5])
    assert unguided.generate(lm, rows[:1], max_new_tokens=2).tokens.shape == (1, 2)
    for way in (
        lambda: unguided.generate(lm, rows, max_new_tokens=2),
        lambda: tokenwise(lm, TokenReward(random_lm("llama", 1), None), rows, max_new_tokens=2),
        lambda: guided(lm, model, rows, USERS[:2], num_candidates=3, max_new_tokens=2),
    ):
        with pytest.raises(PyargsError, match="Blind does not leave padding out.*batch_size=1"):
            way()


def test_spans_of_predicting_states():
    lm = tiny_lm()
    packed = pack([[5, 6, 7]], [[[8, 9], [4, 3, 2]]])
    states = packed_states(lm.get_decoder(), packed)
    predicting, mask = spans(states, packed, predicting=True)
    assert mask.sum(1).tolist() == [2, 3]
    assert torch.equal(predicting[0, 0], states[0, 2]) and torch.equal(predicting[1, 0], states[0, 2])
    assert torch.equal(predicting[1, 2], states[0, 6])
