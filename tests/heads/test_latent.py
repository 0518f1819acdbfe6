"""VPL's head: the order within a pair is its label, and a latent has the length of the training's."""

from __future__ import annotations

import math

import planted
import torch

from pyargs.heads import latent
from pyargs.types import Users


def test_the_order_within_a_pair_is_its_label():
    encoder = latent.Encoder(planted.DIM, 8)
    pairs = torch.randn(1, 4, 2, planted.DIM)
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert not torch.allclose(encoder(pairs, mask)[0], encoder(pairs.flip(2), mask)[0])
    longer = torch.cat([pairs, torch.randn(1, 3, 2, planted.DIM)], dim=1)  # masked pairs change nothing
    partly = torch.cat([mask, torch.zeros(1, 3, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(encoder(pairs, mask), encoder(longer, partly))


def test_vpl_latents_have_the_length_of_the_trainings():
    for normalized in (True, False):
        users, everyone = Users(["a", "b"], latent=torch.randn(2, 6)), torch.arange(2)
        head = latent.Head(planted.DIM, 6, users, normalized=normalized)
        length = head.user_latents(everyone).norm(dim=-1)
        assert torch.allclose(length, torch.full((2,), math.sqrt(6))) == normalized
        assert torch.equal(head.user_latents(everyone), users.vectors["latent"]) == (not normalized)
