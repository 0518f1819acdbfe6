"""Weights that change between two calls, however they are written to: no engine goes on with the old ones."""

from __future__ import annotations

import pytest
import torch
from changed import FEW, adapted, decoded, fast
from decoding import USERS, by_reference, engine_of, pair_in_float32, prompts, same, steps_of

from pyargs.errors import PyargsError
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
    engine, asked = engine_of(policy, model), (prompts([3, 5]), USERS[:2])
    steps_of(engine, *asked, **FEW)
    before = scored()
    change(policy, model)
    with pytest.raises(PyargsError, match=r"engine\.refresh\(\)"):
        engine.generate(*asked, **FEW)
    engine.refresh()
    ours = decoded(policy, model), scored()
    same(steps_of(engine, *asked, **FEW), ours[0])
    monkeypatch.setenv("PYARGS_BACKEND", "eager")
    same(ours[0], decoded(policy, model))
    theirs = scored()
    torch.testing.assert_close(ours[1], theirs, atol=2e-4, rtol=2e-4)
    assert not all(torch.allclose(one, other, atol=1e-3) for one, other in zip(theirs, before, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("side", ["policy", "reward"])
def test_two_that_were_one_are_so_no_longer(backend, lora, side):
    """A copy of the policy's weights is read in one pass with them, until a number in either is another."""
    policy, model = pair_in_float32("shared lora" if lora else "shared")
    engine, asked = engine_of(policy, model, backend=backend, max_rows=1), (prompts([3, 5]), USERS[:2])
    steps_of(engine, *asked, **FEW)
    (policy.model if side == "policy" else model.backbone).norm.weight.data[3] = 9.0
    with pytest.raises(PyargsError, match=r"engine\.refresh\(\)"):
        engine.generate(*asked, **FEW)
    engine.refresh()
    same(steps_of(engine, *asked, **FEW), by_reference(policy, model, *asked, **FEW))
