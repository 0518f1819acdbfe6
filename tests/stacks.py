"""Random models for the CPU stack, batches for them, and what it is compared with."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from conftest import CAPABILITIES
from hypothesis import strategies as st

from pyargs import _C  # noqa: E402
from pyargs.lm import lora
from pyargs.ops.library import has_extension

if not has_extension:
    pytest.skip("no extension", allow_module_level=True)
LEVELS = (*CAPABILITIES, "avx512_vnni", "avx512_bf16")
AVAILABLE = LEVELS[: LEVELS.index(_C.cpu_capability_detected()) + 1]
VOCABULARY = 67


@contextmanager
def using(capability: str):
    before = _C.cpu_capability()
    _C.set_cpu_capability(capability)
    try:
        yield
    finally:
        _C.set_cpu_capability(before)


def random_lm(
    family="llama", *, seed=0, heads=4, kv_heads=2, head_dim=8, hidden=32, inner=48, layers=2, vocabulary=VOCABULARY, **more
):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family,
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=4096,
        pad_token_id=0,
        **more,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3 if parameter.ndim > 1 else 0.5)
    return model


GRANITE = dict(embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.4, logits_scaling=3.0)
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": dict(sliding_window=None),
    "granite": GRANITE,
    "smollm3": dict(no_rope_layers=[0, 1, 0]),
}
"""What the stack computes, and what a config needs for it."""


@st.composite
def models(draw, **fixed):
    family = draw(st.sampled_from(sorted(FAMILIES)))
    kv_heads, share = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    more = dict(
        heads=kv_heads * share,
        kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 24)),
        hidden=kv_heads * share * draw(st.integers(1, 9)),
        inner=draw(st.integers(1, 80)),
        layers=draw(st.integers(1, 3)),
        tie_word_embeddings=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )
    more |= FAMILIES[family]
    if family in ("llama", "granite", "smollm3"):
        more |= dict(attention_bias=draw(st.booleans()), mlp_bias=draw(st.booleans()))
    return random_lm(family, **(more | fixed))


@st.composite
def batches(draw, longest=40):
    """Texts of different lengths, padded on the left: ids, mask, lengths."""
    lengths = draw(st.lists(st.integers(1, longest), min_size=1, max_size=4))
    width = max(lengths) + draw(st.integers(0, 2))
    torch.manual_seed(draw(st.integers(0, 999)))
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return torch.randint(0, VOCABULARY, mask.shape), mask, lengths


@torch.no_grad()
def hf_states(model, text) -> torch.Tensor:
    return model.get_decoder()(torch.as_tensor(text)[None]).last_hidden_state[0].float()


def close(ours, theirs, tolerance=1e-4):
    torch.testing.assert_close(ours, theirs, atol=tolerance * float(theirs.abs().max() + 1), rtol=0)


def identical(ours, theirs):
    assert torch.equal(ours, theirs), f"differs by {(ours - theirs).abs().max()}"


def with_lora(model, modules=("q_proj", "v_proj"), std=0.3):
    decoder = copy.deepcopy(model.get_decoder())
    lora.add(decoder, rank=3, alpha=8, rslora=True, target_modules=modules)
    for name, parameter in decoder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return decoder


def check_that_states_are_their_own(stack, with_threads) -> None:
    """A token's state is the same, bit by bit: in a prompt, one after the other, as a branch in any column, beside others,
    with any threads."""
    text = torch.randint(0, VOCABULARY, (1, 600))
    whole = stack(text, stack.cache(1, 600))
    identical(with_threads(3, lambda: stack(text, stack.cache(1, 600))), whole)

    cache = stack.cache(3, 620)
    parts = [stack(part, cache, rows=[1]) for part in text[:, :550].split([3, 1, 400, 146], dim=1)]
    identical(torch.cat(parts, dim=1), whole[:, :550])
    stack(text[:, :70].expand(2, -1), cache, rows=[2, 0])
    for t in range(550, 570):
        branches = torch.randint(0, VOCABULARY, (3, 13))
        column = t % 13
        branches[1, column] = text[0, t]
        states = stack(branches, cache, branches=True)
        identical(states[1, column], whole[0, t])
        stack.commit(cache, torch.tensor([column]), rows=[1])
    identical(stack(text[:, 570:], cache, rows=[1]), whole[:, 570:])
    identical(stack.logits(whole[0])[599], stack.logits(whole[0, 599:])[0])
