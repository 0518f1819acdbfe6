"""What holds of every head: folded it gives the same rewards, and it adds no constant."""

from __future__ import annotations

import pytest
import torch
from conftest import reward_model, tiny_lm
from hypothesis import given, settings
from hypothesis import strategies as st

from pyargs.heads import linear, mlp
from pyargs.ops import score_select
from pyargs.types import Users

HEADS = ("linear", "mlp", "personal mlp")


@pytest.mark.parametrize("kind", HEADS)
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5), k=st.integers(1, 7), seed=st.integers(0, 99))
def test_a_folded_head_gives_the_same_rewards(kind, rows, k, seed):
    head = reward_model(tiny_lm(), head=kind).head
    torch.manual_seed(seed)
    hidden, user = torch.randn(rows, k, 32), torch.randint(0, 3, (rows,))
    folded = head.fold()
    _, _, reward, _ = score_select(
        folded.features(hidden, user),
        folded.weight,
        user,
        torch.ones(rows),
        torch.zeros(rows, k),
        torch.arange(k).expand(rows, k),
        torch.zeros(rows, dtype=torch.bool),
        bias=folded.bias,
        activation=folded.activation,
    )
    torch.testing.assert_close(reward, head(hidden, user.unsqueeze(1).expand(rows, k)), atol=2e-5, rtol=2e-5)


def test_no_head_has_an_output_bias():
    """A constant has no gradient under Bradley-Terry, so its random start value would stay and count once per token."""
    for head in (linear.Head(4, 1, Users()), mlp.Head(4, 3, Users()), mlp.Head(4, 3, Users(), second=2)):
        assert head(torch.zeros(1, 4), torch.tensor([0])).isfinite()
        assert not any(name.startswith("last.bias") for name, _ in head.named_parameters())
    assert linear.Head(4, 1, Users())(torch.zeros(1, 4), torch.tensor([0])).item() == 0
