"""Parts of a model that are replaced by others of the same look: what a fast path keeps of the old ones is not used."""

from __future__ import annotations

import pytest
import torch
from changed import FEW, adapted, decoded, fast
from conftest import reward_model, tiny_lm
from decoding import USERS, chosen, prompts, same, tokens
from torch import nn

from pyargs.errors import PyargsError
from pyargs.lm.cache import can_branch
from pyargs.lm.forward import masks_every_step


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


def one_layer_twice(lm):
    lm.model.layers[1] = lm.model.layers[0]


def later_tokens(lm):
    lm.model.layers[1].self_attn.is_causal = False


@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize(
    ("change", "message"), [(one_layer_twice, "layers.0.* and .*layers.1.* are one"), (later_tokens, "sees later tokens")]
)
def test_layers_that_no_cache_serves_are_refused_though_the_first_ones_were_tried(change, message, family):
    policy = tiny_lm(family, dtype=torch.float32)
    model = reward_model(tiny_lm(family, seed=1, dtype=torch.float32)).eval()
    uneven, even = prompts([3, 5]), prompts([4, 4])
    ways = [
        lambda rows: chosen(policy, model, rows, USERS[:2], **FEW),
        lambda rows: chosen(policy, None, rows, max_new_tokens=2),
    ]
    before = [tokens(way(rows)) for way in ways for rows in (uneven, even)]
    assert can_branch(policy) and masks_every_step(policy)
    layer, causal = policy.model.layers[1], policy.model.layers[1].self_attn.is_causal
    change(policy)
    assert not can_branch(policy)
    for way in ways:
        for rows in (uneven, even):
            with pytest.raises(PyargsError, match=message):
                way(rows)
    policy.model.layers[1], layer.self_attn.is_causal = layer, causal
    assert before == [tokens(way(rows)) for way in ways for rows in (uneven, even)]
