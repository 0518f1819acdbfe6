"""Rows of the ops that choose, each with a count, a temperature and stop tokens of its own."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

WRONG_CHOICES = [
    ({"stop": torch.zeros(1, 1).long()}, ValueError, "stop"),
    ({"stop": torch.zeros(3, 1, 1).long()}, ValueError, "stop"),
    ({"temperature": 1.0}, ValueError, "belong together"),
    ({"uniform": torch.zeros(3)}, ValueError, "belong together"),
    ({"temperature": 0.0, "uniform": torch.zeros(3)}, ValueError, "> 0"),
    ({"temperature": math.nan, "uniform": torch.zeros(3)}, ValueError, "> 0"),
    ({"count": torch.ones(3)}, TypeError, "count"),
    ({"count": torch.ones(4).long()}, ValueError, "count"),
    ({"count": 2}, TypeError, "torch.Tensor"),
    ({"temperature": torch.ones(3)}, ValueError, "belong together"),
    ({"temperature": torch.ones(3).double(), "uniform": torch.zeros(3)}, TypeError, "temperature"),
    ({"temperature": torch.tensor(1.0), "uniform": torch.zeros(3)}, ValueError, "temperature"),
]
"""What a choice among the candidates of three rows refuses: a change of the arguments, the error, and what it says."""


def differing(data, batch: int, k: int, sampled: bool) -> dict:
    """Counts, temperatures (where sampled) and stop tokens of each row its own; some are none."""

    def each(label: str, values: list) -> list:
        return data.draw(st.lists(st.sampled_from(values), min_size=batch, max_size=batch), label)

    given = {}
    if data.draw(st.booleans(), "rows have their own counts"):
        counts = [1, (k + 1) // 2, k, k, data.draw(st.integers(1, k), "a count"), 0, k + 1, -(2**62)]
        given["count"] = torch.tensor(each("counts", counts), dtype=torch.int64)
    if sampled and data.draw(st.booleans(), "rows have their own temperatures"):
        given["temperature"] = torch.tensor(each("temperatures", [0.0, -0.0, 0.25, 1.0, 3.0, -1.0, math.nan, math.inf]))
    if data.draw(st.booleans(), "rows have their own stops"):
        stops = each("stops", [[-1, -1, -1], [7, -1, -1], [0, 1, 2], [30, 40, 50]])
        given["stop"] = torch.tensor(stops, dtype=torch.int64).view(batch, 3)
    return given
