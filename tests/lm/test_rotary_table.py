"""Looking angles up gives the states of computing them, in the thread that asked for it only."""

from __future__ import annotations

import pytest
import torch
from company import in_threads
from conftest import FULL_ATTENTION, tiny_lm

from pyargs.lm.fused_modules import few_launches


@torch.no_grad()
def states(decoder, first: int) -> torch.Tensor:
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])
    position = first + torch.tensor([[0, 1, 2, 3], [5, 5, 5, 5]])
    seen = torch.ones(2, 1, 4, 4, dtype=torch.bool).tril()
    return decoder(input_ids=ids, attention_mask=seen, position_ids=position, use_cache=False).last_hidden_state


@pytest.mark.parametrize("family", FULL_ATTENTION)
@pytest.mark.parametrize("first", [0, 40])
def test_states_are_the_same(family, first):
    decoder = tiny_lm(family).get_decoder()
    want = states(decoder, first)
    with few_launches(decoder, places=50) as tables:
        torch.testing.assert_close(states(decoder, first), want, atol=1e-9, rtol=1e-9)
        assert all(len(one) == 50 for one in tables)
    assert torch.equal(states(decoder, first), want)


def test_angles_are_looked_up_bit_for_bit():
    rotary, x = tiny_lm("qwen2").get_decoder().rotary_emb, torch.zeros(1, 1, dtype=torch.float32)
    position = torch.tensor([[0, 7, 49], [3, 3, 12]])
    cos, sin = rotary(x, position)
    decoder = tiny_lm("qwen2", dtype=torch.float32).get_decoder()
    with few_launches(decoder, places=50) as tables:
        assert len(tables) == 1 and "forward" in vars(decoder.rotary_emb)
        cosine, sine = decoder.rotary_emb(x, position_ids=position)
        half = sin.shape[-1] // 2
        assert torch.equal(cosine, cos) and torch.equal(sine, sin)
        assert torch.equal(sine.turned, torch.cat([-sin[..., :half], sin[..., half:]], -1))
        found = []
        in_threads(lambda i: found.append(decoder.rotary_emb(x, position_ids=position + 100)[0]), 1)  # beyond the table
        assert torch.equal(found[0], rotary(x, position + 100)[0])
    assert "forward" not in vars(decoder.rotary_emb)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*FULL_ATTENTION[:2], "glm", "ernie4_5", "gpt_neox", "phi", "phi3", "cohere"])
def test_whoever_asks_gets_the_angles_that_are_computed_otherwise(family, dtype):
    """Neighbours or halves, of the whole head or a part of it: nobody gets a sine that is turned already."""
    decoder, x = tiny_lm(family, dtype=dtype).get_decoder(), torch.zeros(1, 1, dtype=dtype)
    position = torch.tensor([[0, 7, 49]])
    want = decoder.rotary_emb(x, position)
    with few_launches(decoder, places=50):
        assert "forward" in vars(decoder.rotary_emb)
        for one, other in zip(decoder.rotary_emb(x, position), want, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["dynamic", {"full_attention": "default"}])
def test_frequencies_that_may_change_are_computed(kind):
    decoder = tiny_lm("qwen2").get_decoder()
    decoder.rotary_emb.rope_type = kind
    with few_launches(decoder, places=50) as tables:
        assert not tables and "forward" not in vars(decoder.rotary_emb)


def test_without_a_number_of_places_nothing_is_looked_up():
    with few_launches(tiny_lm("qwen2").get_decoder()) as tables:
        assert not tables
