"""Weights that change between two calls, however they are written to: the next call sees them."""

from __future__ import annotations

import pytest
import torch
from conftest import reward_model, tiny_lm
from decode.test_args import same
from invariants.test_changed_modules import decoded, fast
from torch import nn

from pyargs.lm import lora
from pyargs.scoring import _cached, response_logprobs, response_states


def adapted():
    policy = tiny_lm(dtype=torch.float32)
    model = reward_model(policy)
    lora.add(model.backbone, rank=2, alpha=4, rslora=False, target_modules=["q_proj", "v_proj", "down_proj"])
    for name, parameter in model.backbone.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    return policy, model.eval()


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


def test_features_are_of_the_model_as_it_is(tmp_path):
    lm, inputs, found = tiny_lm(dtype=torch.float32), [[1, [2]]], []
    ask = lambda: _cached("features", lm, inputs, lambda: (found.append(0), {"x": torch.zeros(1)})[1])  # noqa: E731
    for _ in range(2):
        ask()
    assert len(found) == 1
    lm.model.rotary_emb.inv_freq = lm.model.rotary_emb.inv_freq * 0.5
    ask()
    lm.model.layers[0].mlp.act_fn = nn.ReLU()
    ask()
    lm.model.layers[0].self_attn.scaling = 2.0
    for _ in range(2):
        ask()
    assert len(found) == 4
    lm.model.layers[0].register_forward_hook(lambda *a: None)
    for _ in range(2):  # never kept
        ask()
    assert len(found) == 6


def test_features_of_other_arithmetic_are_not_taken(capability):
    """Another processor, another torch or another build of the extension rounds otherwise: a cache may be shared by all."""
    lm, found = tiny_lm(dtype=torch.float32), []
    ask = lambda: _cached("features", lm, [], lambda: (found.append(0), {"x": torch.zeros(1)})[1])  # noqa: E731
    ask()
    ask()
    assert len(found) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ANOTHER")
        ask()
    from pyargs import _C

    _C.set_cpu_capability("avx2" if capability == "default" else "default")
    ask()
    assert len(found) == 3
