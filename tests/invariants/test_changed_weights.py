"""Weights that change between two calls, however they are written to: the next call sees them."""

from __future__ import annotations

import pytest
import torch
from changed import adapted, decoded, fast
from decoding import same

from pyargs.scoring import response_logprobs, response_states


def element(policy, model):
    policy.model.layers[1].mlp.up_proj.weight.data[5, 7] += 20.0


def row_of_the_head(policy, model):
    policy.lm_head.weight.data[17] *= -4.0


def two_rows(policy, model):
    weight = policy.lm_head.weight.data
    weight[[10, 28]] = weight[[28, 10]]  # the same numbers at other places


def of_a_norm(policy, model):
    policy.model.norm.weight.data[3] = 9.0


def of_lora(policy, model):
    model.backbone.layers[1].mlp.down_proj.lora_B["default"].weight.data[3, 1] += 30.0


def by_numpy(policy, model):
    policy.model.layers[0].self_attn.o_proj.weight.detach().numpy()[2, 3] = 30.0


def of_the_embedding(policy, model):
    policy.model.embed_tokens.weight.data[6, 0] += 5.0


CHANGES = element, row_of_the_head, two_rows, of_a_norm, of_lora, by_numpy, of_the_embedding


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_number_is_seen(change, monkeypatch):
    policy, model = adapted()
    groups = [([5, 6, 7], [[8, 9, 10], [28, 17]])]
    scored = (
        (lambda: response_states(model.backbone, groups)[0])
        if change is of_lora
        else (lambda: response_logprobs(policy, groups)[0])
    )
    assert fast(policy, model)
    decoded(policy, model)
    before = scored()
    change(policy, model)
    ours = decoded(policy, model), scored()
    monkeypatch.setenv("PYARGS_BACKEND", "eager")
    same(ours[0], decoded(policy, model))
    theirs = scored()
    torch.testing.assert_close(ours[1], theirs, atol=2e-4, rtol=2e-4)
    assert not all(torch.allclose(one, other, atol=1e-3) for one, other in zip(theirs, before, strict=True))
