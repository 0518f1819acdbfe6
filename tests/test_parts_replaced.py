"""Parts of a model that are replaced by others of the same look: what a fast path keeps of the old ones is not used."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_lm
from test_changed_weights import adapted
from test_decode import same
from test_structure import decoded, fast
from torch import nn
from transformers.models.llama import modeling_llama

from pyargs.lm.structure import as_written


class Callable:
    def __call__(self, q, k, *args, **kwargs):
        return q, k


def rotary(policy, model):
    new = type(policy.model.rotary_emb)(policy.config)
    new.inv_freq = new.inv_freq * 0.1
    policy.model.rotary_emb = new


def embedding(policy, model):
    table = policy.model.embed_tokens.weight
    policy.model.embed_tokens.weight = nn.Parameter(table.detach().clone())
    table.data.zero_()  # the numbers of the model are as before


def sizes(policy, model):
    policy.config.num_attention_heads, policy.config.num_key_value_heads = 2, 1


def dropout(policy, model):
    model.backbone.layers[1].mlp.down_proj.lora_dropout["default"] = nn.ReLU()


def bias(policy, model):
    model.backbone.layers[1].mlp.down_proj.lora_A["default"].bias = nn.Parameter(torch.full((2,), 3.0))


@torch.no_grad()
@pytest.mark.parametrize("change", [rotary, embedding, sizes, dropout, bias], ids=lambda change: change.__name__)
def test_a_part_of_the_same_look_counts(change, monkeypatch):
    policy, model = adapted()
    assert fast(policy, model)
    decoded(policy, model)
    change(policy, model)
    ours = decoded(policy, model)
    monkeypatch.setenv("PYARGS_BACKEND", "eager")
    same(ours, decoded(policy, model))


def test_what_hides_functions_and_parts_is_seen(monkeypatch):
    policy = tiny_lm()
    mlp = policy.model.layers[0].mlp
    for place, name, value in (
        (modeling_llama, "apply_rotary_pos_emb", Callable()),
        (type(mlp), "down_proj", property(lambda self: torch.tanh)),
        (nn.Module, "__getattr__", lambda self, name: None),
        (mlp, "_compiled_call_impl", lambda x: x),
    ):
        assert as_written(policy)
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value, raising=False)
            assert not as_written(policy), name
    del mlp.act_fn
    mlp.act_fn = Callable()
    assert not as_written(policy)
