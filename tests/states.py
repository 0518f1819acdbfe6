"""States of rows for the ops that keep them (`pyargs.ops.RowState`)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import strategies as st

from pyargs.ops import RowState
from pyargs.ops.row_state import CHOSEN, WRITTEN


def state_of(batch: int = 3, **changes) -> RowState:
    """Rows of which none has stopped, in different steps; no stop tokens."""
    garbage = torch.full((batch,), -9)
    state = RowState(
        reward_weight=torch.ones(batch),
        finished=torch.zeros(batch, dtype=torch.bool),
        step=torch.arange(batch) % 3,
        limit=torch.full((batch,), 9),
        token=garbage,
        slot=garbage.clone(),
        chosen=torch.full((batch, CHOSEN), math.nan, dtype=torch.float64),
        stop=torch.full((batch, 1), -1),
    )
    return state._replace(**changes)


def copied(state: RowState) -> RowState:
    return RowState(*(None if part is None else part.clone() for part in state))


def drawn_state(data, batch: int, k: int, *, sums: bool = True) -> RowState:
    """Any state; what is drawn leaves no filter and no sum to rounding."""

    def each(label: str, values: list, dtype) -> torch.Tensor:
        return torch.tensor(data.draw(st.lists(st.sampled_from(values), min_size=batch, max_size=batch), label), dtype=dtype)

    def maybe(label: str) -> bool:
        return data.draw(st.booleans(), label)

    state = state_of(
        batch,
        reward_weight=each("weights", [-2.0, -0.5, 0.0, 0.25, 1.0], torch.float32),
        finished=each("finished", [False, False, False, True], torch.bool),
        step=each("steps", [0, 1, 3, 7], torch.int64),  # w / (step + 1) has no rounding
        limit=each("limits", [1, 2, 8, 9], torch.int64),
    )
    if maybe("stops of each row"):
        stops = each("stops", [0, 1, 2, 3], torch.int64)
        table = torch.tensor([[-1, -1, -1], [7, -1, -1], [0, 1, 2], [30, 40, 50]])
        state = state._replace(stop=table[stops])
    elif maybe("stops"):
        state = state._replace(stop=torch.tensor([7, 1, 2]))
    if sums and maybe("so far"):
        state = state._replace(so_far=each("rewards so far", [-0.5, 0.75, 2.0], torch.float32))
    if sums and maybe("mean"):
        state = state._replace(total=each("totals", [-1.0, 0.0, 3.5], torch.float32))
    if maybe("sampled"):
        noise = torch.rand(batch, data.draw(st.integers(1, 9), "steps of noise"), generator=torch.Generator().manual_seed(5))
        heat = each("temperatures", [0.0, -0.0, 0.25, 1.0, 3.0, -1.0, math.nan, math.inf], torch.float32)
        state = state._replace(temperature=heat, noise=noise)
    kind = data.draw(st.sampled_from(["all", "count", "filters"]), "candidates")
    if kind == "count":
        state = state._replace(count=each("counts", [1, (k + 1) // 2, k, k, 0, k + 1, -(2**62)], torch.int64))
    elif kind == "filters":
        state = state._replace(
            own_k=each("own k", [0, 1, (k + 1) // 2, k, 64], torch.int64),
            top_p=each("top p", [1.0, 1.0, 0.9123, 0.4321], torch.float64),
            min_p=each("min p", [0.0, 0.0, 0.0567, 0.2345], torch.float64),
        )
    return state


def same_state(got: RowState, expected: RowState, rows: torch.Tensor | None = None, *, bitwise: bool = False) -> None:
    """Where the rewards may be rounded otherwise, their sums may, too; in `rows`, by default in all."""
    for name, one, other in zip(RowState._fields, got, expected, strict=True):
        if one is not None and name in WRITTEN and rows is not None:
            one, other = one[rows], other[rows]
        if name in ("chosen", "so_far", "total") and one is not None and not bitwise:
            torch.testing.assert_close(
                one, other, atol=5e-5, rtol=1e-5, equal_nan=True, msg=lambda text, name=name: name + text
            )
        else:
            assert (one is None) == (other is None) and (one is None or torch.equal(_bits(one), _bits(other))), name


def _bits(values: torch.Tensor) -> torch.Tensor:
    """So that NaN is NaN."""
    return values.nan_to_num(nan=12345.0) if values.is_floating_point() else values


WRONG_STATES = [
    ({"step": torch.zeros(3)}, TypeError, "step"),
    ({"step": torch.zeros(4).long()}, ValueError, "step"),
    ({"step": torch.zeros(6).long()[::2]}, ValueError, "step is written to and must be contiguous"),
    ({"finished": torch.zeros(1).bool().expand(3)}, ValueError, "finished is written to"),
    ({"chosen": torch.zeros(3, 4).double()}, ValueError, "chosen"),
    ({"chosen": torch.zeros(3, 5)}, TypeError, "chosen"),
    ({"chosen": torch.zeros(5, 3).double().T}, ValueError, "chosen is written to"),
    ({"limit": None}, TypeError, "limit"),
    ({"stop": torch.zeros(2, 1).long()}, ValueError, "stop"),
    ({"temperature": torch.ones(3)}, ValueError, "belong together"),
    ({"noise": torch.ones(3, 2)}, ValueError, "belong together"),
    ({"noise": torch.ones(3, 0), "temperature": torch.ones(3)}, ValueError, "at least one step"),
    ({"noise": torch.ones(3), "temperature": torch.ones(3)}, ValueError, "noise"),
    ({"own_k": torch.ones(3).long()}, ValueError, "belong together"),
    ({"own_k": torch.ones(3).long(), "top_p": torch.ones(3), "min_p": torch.ones(3).double()}, TypeError, "top_p"),
    (
        {"own_k": torch.ones(3).long(), "top_p": torch.ones(3).double(), "min_p": torch.ones(3).double()}
        | {"count": torch.ones(3).long()},
        ValueError,
        "give one of them",
    ),
    ({"count": torch.ones(3)}, TypeError, "count"),
]
"""What a step of three rows refuses: a change of the state, the error, and what it says."""


def refused(op, default, arguments: tuple, state: RowState, change: dict, error, says) -> None:
    """By the op, its reference and the op's own checks; nothing has been written."""
    before, wrong = copied(state), state._replace(**change)
    with pytest.raises(error, match=says):
        op(*arguments, wrong)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        default(*arguments, *wrong)
    same_state(state, before, bitwise=True)
