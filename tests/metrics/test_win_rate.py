"""Win rates: strict, and of nobody over oneself."""

from __future__ import annotations

import pytest
import torch

from pyargs.errors import PyargsError
from pyargs.metrics.win_rate import win_rate


class Longest:
    """A reward model that likes long answers of its user's favourite token."""

    def score(self, groups, users):
        favourite = {"a": 1, "b": 2}
        return [
            torch.tensor([r.count(favourite[user]) for r in several]) for (_, several), user in zip(groups, users, strict=True)
        ]


def test_win_rate_by_hand():
    prompts, users = [[9], [9], [9], [9]], ["a", "b", "a", "b"]
    ours, theirs = [[1, 1], [1, 1], [1], []], [[1], [2], [1], [2]]
    found = win_rate(Longest(), prompts, users, ours, theirs)
    assert found == {
        "win_rate": 25,
        "tie_rate": 25,
        "n": 4,
        "unscored": 1,
        "each": {"a": "10", "b": "00"},
        "tokens": [1.25, 1],
    }
    assert win_rate(Longest(), prompts, users, ours, ours)["win_rate"] == 0  # never over oneself
    swapped = win_rate(Longest(), prompts, users, theirs, ours)
    assert found["win_rate"] + swapped["win_rate"] + found["tie_rate"] + 25 * found["unscored"] == 100
    with pytest.raises(PyargsError, match="no answers"):
        win_rate(Longest(), [], [], [], [])
