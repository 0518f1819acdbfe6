"""Fewer kernels for a layer, and the same numbers."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from company import in_threads
from conftest import FULL_ATTENTION, tiny_lm
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from pyargs.lm import fused_modules
from pyargs.lm.cache import RowCache, cache_name, can_branch, positions
from pyargs.lm.fused_modules import OTHERWISE, _by_length, _Rotary, few_launches, takes_lengths
from pyargs.lm.stack import keep
from pyargs.lm.structure import Watch, as_written, structure
from pyargs.ops import branch_attention


def of_odd_heads(seed=0):
    """A model whose heads have 12 elements."""
    config = copy.deepcopy(tiny_lm("qwen2").config)
    config.head_dim = 12
    torch.manual_seed(seed)
    return type(tiny_lm("qwen2"))(config).float().eval()


@torch.no_grad()
def behind(decoder, prompts: list[list[int]], candidates: torch.Tensor, by_length: bool) -> torch.Tensor:
    """States [n, k, D] of candidates [n, k] in a captured pass: n may be more than there are prompts, which are padded."""
    n, k = candidates.shape
    longest = max(map(len, prompts))
    cache = RowCache(decoder.config, n, longest + k + 3, "cpu")
    ids = torch.tensor([[0] * (longest - len(one)) + one for one in prompts])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts])
    more = {cache_name(decoder): cache, "use_cache": True}
    decoder(input_ids=ids, attention_mask=cache.join(mask), position_ids=positions(mask), **more)
    cache.captured = n
    seen, place = cache.branches(k, by_length), cache.position.expand(n, k)
    assert (seen.dtype == torch.int64) == by_length
    return decoder(input_ids=candidates, attention_mask=seen, position_ids=place, **more).last_hidden_state


@settings(max_examples=40, deadline=None)
@given(
    family=st.sampled_from(FULL_ATTENTION),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    empty=st.integers(0, 2),
    k=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_attention_by_length_gives_the_states_of_attention_with_a_mask(family, lengths, empty, k, seed):
    """Rows of any length, padded on the left, and such as are not here; one next token, or several."""
    decoder, generator = tiny_lm(family).get_decoder(), torch.Generator().manual_seed(seed)
    prompts = [torch.randint(61, (length,), generator=generator).tolist() for length in lengths]
    candidates = torch.randint(61, (len(lengths) + empty, k), generator=generator)
    with_mask = behind(decoder, prompts, candidates, by_length=False)
    with few_launches(decoder):
        assert takes_lengths(decoder)
        torch.testing.assert_close(behind(decoder, prompts, candidates, by_length=True), with_mask, atol=1e-9, rtol=1e-9)
    assert not takes_lengths(decoder)


def test_attention_that_may_be_another_keeps_its_mask():
    """Falcon has its own; eager adds a mask; the op has no heads of 12 elements."""
    for decoder in (tiny_lm("falcon").get_decoder(), tiny_lm(attention="eager").get_decoder(), of_odd_heads().get_decoder()):
        with few_launches(decoder):
            assert not takes_lengths(decoder)


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_attention_by_length_does_not_compute_is_refused_by_name(name):
    x, length = torch.zeros(1, 2, 3, 8), torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    assert _by_length(None, x, x, x, length, **dict.fromkeys(OTHERWISE))[0].shape == (1, 3, 2, 8)
    for unusual in (torch.zeros(2), 0.5):
        with pytest.raises(ValueError, match=f"attention with {name} needs a mask"):
            _by_length(None, x, x, x, length, **{name: unusual})


def test_a_decoder_whose_attention_has_a_window_keeps_its_mask(monkeypatch):
    decoder = tiny_lm("qwen2").get_decoder()
    monkeypatch.setattr(decoder.layers[1].self_attn, "sliding_window", 4)
    with few_launches(decoder):
        assert not takes_lengths(decoder)


@pytest.mark.parametrize("family", ["gemma", "glm", "falcon", "gpt_neox", "olmo"])
def test_other_formulas_of_the_same_name_are_left_alone(family):
    """Gemma's norm adds 1 to its weight; GLM turns neighbours instead of halves, GPT-NeoX a part of a head; Falcon asks its
    config which attention it has."""
    policy = tiny_lm(family, dtype=torch.float32)
    x = dict(input_ids=torch.tensor([[3, 4, 5]]), attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool).tril())
    before = policy(**x).logits
    with few_launches(policy.get_decoder()):
        torch.testing.assert_close(policy(**x).logits, before, atol=2e-5, rtol=2e-5)


def replaced(decoder, places: int = 50) -> set[str]:
    """What `few_launches` changes."""
    with few_launches(decoder, places=places):
        source = sys.modules[type(decoder).__module__]
        found = {name for name, part in decoder.named_modules() if "forward" in vars(part)}
        found |= {"rotary"} if isinstance(getattr(source, "apply_rotary_pos_emb", None), _Rotary) else set()
        return found | {decoder.config._attn_implementation}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "family", [*FULL_ATTENTION, "gemma", "glm", "falcon", "gpt_neox", "olmo2", "ernie4_5", "cohere", "phi3"]
)
def test_what_is_replaced_does_not_depend_on_the_rounding(family, dtype):
    """ERNIE turns neighbours, which a tiny model of bfloat16 hides by its rounding."""
    assert replaced(tiny_lm(family, dtype=dtype).get_decoder()) == replaced(tiny_lm(family, dtype=torch.float32).get_decoder())


ROTATE = modeling_llama.apply_rotary_pos_emb
ROTATIONS = {
    "backwards": lambda q, k, cos, sin, **more: ROTATE(q, k, cos, -sin, **more),
    "a half backwards": lambda q, k, cos, sin, **more: ROTATE(q, k, cos, torch.cat([-sin[..., :4], sin[..., 4:]], -1), **more),
    "a tenth faster": lambda q, k, cos, sin, **more: ROTATE(q, k, cos, sin * 1.1, **more),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ROTATIONS)
def test_another_rotation_stays_in_every_dtype(name, dtype, monkeypatch):
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", ROTATIONS[name])
    assert "rotary" not in replaced(tiny_lm("llama", dtype=dtype).get_decoder())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_of_another_size_stays_in_every_dtype(dtype, monkeypatch):
    before = modeling_llama.LlamaRMSNorm.forward
    decoder = tiny_lm("llama", dtype=dtype).get_decoder()
    assert "norm" in replaced(decoder)
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", lambda self, x: before(self, x) * 0.98)
    assert not any("norm" in name for name in replaced(decoder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_of_another_scale_stays_in_every_dtype(dtype, monkeypatch):
    decoder = tiny_lm("llama", dtype=dtype).get_decoder()
    monkeypatch.setattr(fused_modules, "branch_attention", lambda *given: branch_attention(*given[:-1], given[-1] * 1.05))
    assert fused_modules.BY_LENGTH not in replaced(decoder)


def test_each_decoder_has_its_own_attention():
    """What one keeps of a pass, its mask, is not the other's. Of heads that `branch_attention` does not take."""
    models = [of_odd_heads(seed).get_decoder() for seed in (0, 1)]
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
