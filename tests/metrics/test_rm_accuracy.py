"""Reward accuracy: strict comparisons, ties counted, in any order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyargs.errors import PyargsError
from pyargs.metrics.rm_accuracy import rm_accuracy


def test_ties_are_errors_and_are_counted():
    found = rm_accuracy(torch.tensor([[2.0, 1.0], [1.0, 1.0], [0.0, 1.0], [3.0, 1.0]]), ["a", "a", "a", "b"])
    assert found["accuracy"] == 50 and found["tie_rate"] == 25 and found["n"] == 4 and found["users"] == 2
    assert found["macro"] == pytest.approx(100 * (1 / 3 + 1) / 2) and found["each"] == {"a": "100", "b": "1"}
    with pytest.raises(PyargsError, match="no pairs"):
        rm_accuracy(torch.zeros(0, 2), [])
    with pytest.raises(PyargsError, match="not a number"):
        rm_accuracy(torch.tensor([[float("nan"), 1.0]]), ["a"])


@given(st.permutations(range(6)))
def test_the_order_of_pairs_does_not_matter(order):
    rewards = torch.tensor([[1.0, 0], [0, 1], [2, 2], [5, 1], [1, 5], [3, 2]])
    users = ["a", "b", "a", "c", "c", "b"]
    one, two = rm_accuracy(rewards[list(order)], [users[i] for i in order]), rm_accuracy(rewards, users)
    assert {u: sorted(e) for u, e in one.pop("each").items()} == {u: sorted(e) for u, e in two.pop("each").items()}
    assert one == two
