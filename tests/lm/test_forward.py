"""Packed passes; padding that counts and lengths that change a model are refused."""

from __future__ import annotations

from inspect import Parameter, Signature

import pytest
import torch
from conftest import reward_model, tiny_lm
from decoding import USERS, chosen, engine_of, prompts, steps_of, tokens
from families import random_lm

from pyargs.errors import PyargsError
from pyargs.lm.cache import cache_name
from pyargs.lm.forward import packed_states, spans
from pyargs.lm.tokenize import pack
from pyargs.models.token_reward import TokenReward
from pyargs.scoring import response_states


def test_longrope_across_its_border_is_refused():
    policy, rows = random_lm("phi3 longrope", 0), prompts([2, 10])
    for model in (None, reward_model(random_lm("phi3 longrope", 1)), TokenReward(policy, None)):
        with pytest.raises(PyargsError, match="more than 12 tokens"):
            chosen(policy, model, rows, ["ann"] * 2, max_new_tokens=4)
    for responses in ([[3], [4] * 12], [[4] * 2, [4] * 14]):
        with pytest.raises(PyargsError, match="more than 12 tokens"):
            response_states(policy.get_decoder(), [(rows[0], responses)])


def test_a_model_that_padding_changes_is_refused_where_there_is_padding():
    from transformers import LlamaForCausalLM

    class Blind(LlamaForCausalLM):
        def forward(self, **given):
            return super().forward(**given)

    taken = ("self", "input_ids", "use_cache", cache_name(random_lm("llama", 0)))  # transformers has changed its name
    Blind.forward.__signature__ = Signature([Parameter(name, Parameter.KEYWORD_ONLY) for name in taken])
    config = random_lm("llama", 0).config
    torch.manual_seed(0)
    lm = Blind(config).double().eval()  # in float64, which the CPU stack leaves alone
    rows = prompts([3, 5])
    for model in (None, TokenReward(random_lm("llama", 1), None), reward_model(random_lm("llama", 1))):
        with pytest.raises(PyargsError, match="Blind does not leave padding out.*max_rows=1"):
            chosen(lm, model, rows, USERS[:2], max_new_tokens=2)
        one = engine_of(lm, model, max_rows=1)
        each = [chosen(lm, model, [row], [user], max_new_tokens=2)[0] for row, user in zip(rows, USERS, strict=False)]
        assert tokens(steps_of(one, rows, USERS[:2], max_new_tokens=2)) == tokens(each)


def test_spans_of_predicting_states():
    lm = tiny_lm()
    packed = pack([[5, 6, 7]], [[[8, 9], [4, 3, 2]]])
    states = packed_states(lm.get_decoder(), packed)
    predicting, mask = spans(states, packed, predicting=True)
    assert mask.sum(1).tolist() == [2, 3]
    assert torch.equal(predicting[0, 0], states[0, 2]) and torch.equal(predicting[1, 0], states[0, 2])
    assert torch.equal(predicting[1, 2], states[0, 6])
