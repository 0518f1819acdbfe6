"""Fewer kernels for a layer, and the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from company import in_threads
from conftest import tiny_lm
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pyargs.lm.cache import can_branch
from pyargs.lm.fused_modules import few_launches
from pyargs.lm.stack import keep
from pyargs.lm.structure import Watch, as_written, structure


@pytest.mark.parametrize("family", ["gemma", "glm", "falcon", "gpt_neox", "olmo"])
def test_other_formulas_of_the_same_name_are_left_alone(family):
    """Gemma's norm adds 1 to its weight; GLM turns neighbours instead of halves, GPT-NeoX a part of a head; Falcon asks its
    config which attention it has."""
    policy = tiny_lm(family, dtype=torch.float32)
    x = dict(input_ids=torch.tensor([[3, 4, 5]]), attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool).tril())
    before = policy(**x).logits
    with few_launches(policy.get_decoder()):
        torch.testing.assert_close(policy(**x).logits, before, atol=2e-5, rtol=2e-5)


def test_each_decoder_has_its_own_attention():
    """What one keeps of a pass, its mask, is not the other's."""
    models = [tiny_lm(seed=seed, dtype=torch.float32).get_decoder() for seed in (0, 1)]
    ids, seen = torch.tensor([[3, 4, 5]]), torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    inputs = [dict(input_ids=ids, attention_mask=seen.clone()) for _ in models]
    with few_launches(*models):
        for model, more in zip(models, inputs, strict=True):
            model(**more)
        ways = [ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation] for model in models]
        assert all(way.last[0] is more["attention_mask"] for way, more in zip(ways, inputs, strict=True))
    assert [model.config._attn_implementation for model in models] == ["sdpa", "sdpa"]
    assert all(way.last == (None, None) for way in ways)


def test_a_model_of_the_same_family_that_turns_a_part_of_each_head_is_left_alone():
    """Of Phi-3 all is turned, of Phi-4-mini three quarters, by one function of the module that they share."""
    whole = tiny_lm("phi3", dtype=torch.float32)
    config = copy.deepcopy(whole.config)
    config.rope_parameters["partial_rotary_factor"] = 0.5
    part = type(whole)(config).eval()
    x = dict(input_ids=torch.tensor([[3, 4, 5]]), attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool).tril())
    before = part(**x).logits
    for decoders in ([whole], [whole, part], [part, whole]):
        with few_launches(*(model.get_decoder() for model in decoders)):
            torch.testing.assert_close(part(**x).logits, before, atol=2e-5, rtol=2e-5)


def test_other_threads_see_and_compute_what_they_always_do():
    """Padding in a mask [B, T] is left out, and nothing has changed."""
    policy = tiny_lm("qwen2", dtype=torch.float32)
    x = dict(input_ids=torch.tensor([[1, 1, 5, 6], [3, 4, 5, 6]]), attention_mask=torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))
    watch, seen = Watch(policy), []

    @torch.no_grad()
    def look(_):
        seen.append((structure(policy), can_branch(policy), as_written(policy), keep.refusal(policy), watch.changed()))
        seen.append(policy(**x).logits[:, 2:])

    look(0)
    with few_launches(policy.get_decoder()):
        in_threads(look, 1)
    assert seen[0] == seen[2] and seen[0][1:] == (True, True, None, False)
    torch.testing.assert_close(seen[1], seen[3], atol=2e-5, rtol=2e-5)
