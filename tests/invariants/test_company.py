"""A row alone is the row in any company, bit by bit, on the native path."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from every_head import HEADS, NAMES, decoded
from hypothesis import given, settings
from hypothesis import strategies as st

from pyargs.ops.library import has_extension

pytestmark = pytest.mark.skipif(not has_extension, reason="no extension")


@pytest.mark.parametrize("head", HEADS)
def test_rewards_of_a_row_alone_are_those_in_a_batch(head):
    torch.manual_seed(0)
    rows = [torch.randint(0, 61, (n % 7 + 1,)).tolist() for n in range(16)]
    users = [NAMES[n % 3] for n in range(16)]
    for together, row, user in zip(decoded(head, rows, users, 10), rows, users, strict=True):
        same_row(together, *decoded(head, [row], [user], 10))


def same_row(together, alone) -> None:
    """Everything but its number, and the seed that a greedy row has no use for."""
    assert replace(together, number=0, seed=0) == replace(alone, number=0, seed=0)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), head=st.sampled_from(sorted(HEADS)), k=st.integers(1, 12), temperature=st.sampled_from([0.0, 0.7]))
def test_any_company(data, head, k, temperature):
    rows = data.draw(st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=9), min_size=2, max_size=9))
    users = data.draw(st.lists(st.sampled_from(NAMES), min_size=len(rows), max_size=len(rows)))
    seeds = list(range(len(rows)))
    together = decoded(head, rows, users, k, temperature=temperature, seed=seeds)
    n = data.draw(st.integers(0, len(rows) - 1))
    (alone,) = decoded(head, rows[n : n + 1], users[n : n + 1], k, temperature=temperature, seed=seeds[n : n + 1])
    same_row(together[n], alone)
