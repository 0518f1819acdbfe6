"""Weights in a stack: every kind of rope and LoRA that it has is as in transformers, and what it has not is named."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import AVAILABLE, FAMILIES, VOCABULARY, batches, close, hf_states, identical, models, random_lm, using, with_lora

from pyargs.errors import PyargsError
from pyargs.lm import lora
from pyargs.lm.stack import pack


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ],
)
def test_rope_scaling(scaling):
    model = random_lm(rope_parameters={"rope_theta": 500.0, **scaling}, head_dim=32)
    stack = pack.pack(model)
    text = torch.randint(0, VOCABULARY, (1, 100))
    close(stack(text, stack.cache(1, 100))[0], hf_states(model, text[0]))


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@settings(max_examples=30, deadline=None)
@given(
    model=models(),
    batch=batches(20),
    modules=st.sets(st.sampled_from(ALL), min_size=1),
    capability=st.sampled_from(AVAILABLE),
    merged=st.booleans(),
)
def test_lora_merged_and_as_a_delta_of_single_rows(model, batch, modules, capability, merged):
    ids, mask, _ = batch
    tuned = with_lora(model, sorted(modules))
    delta = torch.arange(len(ids)) % 2 == 0
    truth = [hf_states(tuned if d else model, text[seen]) for text, seen, d in zip(ids, mask, delta, strict=True)]
    lora_states = [hf_states(tuned, text[seen]) for text, seen in zip(ids, mask, strict=True)]
    both = pack.pack(model, adapter=tuned)
    if merged:
        lora.merge(tuned)
    alone, plain = pack.pack(tuned), pack.pack(model)
    with using(capability):
        run = lambda stack, **more: stack(ids, stack.cache(len(ids), ids.shape[1]), mask, **more)  # noqa: E731
        for row, seen, states in zip(run(both, delta=delta), mask, truth, strict=True):
            close(row[seen], states)
        for states in (run(alone), run(both, delta=True)):
            for row, seen, truth in zip(states, mask, lora_states, strict=True):
                close(row[seen], truth)
        identical(run(both), run(plain))
        assert torch.equal(run(both, delta=delta)[~delta], run(plain)[~delta])


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda: random_lm(hidden_act="gelu"), "gelu"),
        (lambda: random_lm("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=0), "sliding_attention"),
        (lambda: random_lm(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "dynamic"),
        (lambda: random_lm("mistral"), "a sliding window"),
        (lambda: random_lm("olmo2"), "olmo2"),
        (lambda: changed("mistral", sliding_window=4), "a sliding window"),
        (lambda: changed("smollm3", layer_types=["full_attention", "sliding_attention"]), "sliding_attention"),
        (lambda: changed("granite", residual_multiplier=2.0), "another scale"),
        (lambda: changed("granite", embedding_multiplier=2.0), "another scale"),
        (lambda: changed("granite", attention_multiplier=2.0), "another scale"),
        (lambda: with_part("qwen3", "q_norm", variance_epsilon=0.1), "another epsilon"),
        (lambda: with_part("qwen3", "k_norm", weight=torch.nn.Parameter(torch.ones(1))), "norms of queries and keys"),
        (lambda: random_lm().double(), "float64"),
        (lambda: random_lm().to("meta"), "meta"),
    ],
)
def test_what_is_not_supported_is_named(change, named):
    with pytest.raises(PyargsError, match=named):
        pack.pack(change())


def changed(family: str, **config):
    """A model whose config was changed when its modules were made."""
    model = random_lm(family, **FAMILIES[family])
    vars(model.config).update(config)
    return model


def with_part(family: str, name: str, **attributes):
    model = random_lm(family)
    part = model.model.layers[1].self_attn.get_submodule(name)
    for key, value in attributes.items():
        setattr(part, key, value)
    return model


def test_what_a_family_s_attention_does_not_read_changes_nothing():
    """Norms and scales count where the family's own code has them."""
    model, text = random_lm(), torch.randint(0, VOCABULARY, (1, 9))
    before = pack.pack(model)
    for layer in model.model.layers:
        layer.residual_multiplier, layer.self_attn.use_rope = 3.0, False
        layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.RMSNorm(8)
    after = pack.pack(model)
    identical(after(text, after.cache(1, 9)), before(text, before.cache(1, 9)))
    close(after(text, after.cache(1, 9))[0], hf_states(model, text[0]))


def test_layers_that_turn_nothing_are_read_from_the_modules():
    model = random_lm("smollm3", no_rope_layers=[1, 1])
    model.model.layers[0].self_attn.use_rope = 0
    text = torch.randint(0, VOCABULARY, (1, 20))
    stack = pack.pack(model)
    close(stack(text, stack.cache(1, 20))[0], hf_states(model, text[0]))


def test_an_adapter_of_another_model_is_refused():
    with pytest.raises(PyargsError, match="same base weights"):
        pack.pack(random_lm(seed=1), adapter=with_lora(random_lm(seed=2)))
