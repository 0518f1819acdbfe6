"""Fewer kernels for a layer, and the same numbers."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_lm

from pyargs.lm.fused_modules import few_launches


@pytest.mark.parametrize("family", ["gemma", "glm", "falcon", "gpt_neox", "olmo"])
def test_other_formulas_of_the_same_name_are_left_alone(family):
    """Gemma's norm adds 1 to its weight; GLM turns neighbours instead of halves, GPT-NeoX a part of a head; Falcon asks its
    config which attention it has."""
    policy = tiny_lm(family, dtype=torch.float32)
    x = dict(input_ids=torch.tensor([[3, 4, 5]]), attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool).tril())
    before = policy(**x).logits
    with few_launches(policy.get_decoder()):
        torch.testing.assert_close(policy(**x).logits, before, atol=2e-5, rtol=2e-5)
