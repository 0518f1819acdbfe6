"""The rule of the choice on cases by hand: in PyTorch, in the op, and in the CUDA kernel emulated."""

from __future__ import annotations

import math

import emulated
import pytest
import torch

from pyargs.ops import score_select
from pyargs.ops.choice import choose

INF, NAN, BIG = math.inf, math.nan, 3e38


def by_op(op):
    """score_select whose rewards are those given."""

    def run(logprobs, reward, reward_weight, ids, finished, **choice):
        user = torch.zeros(len(ids), dtype=torch.int64)
        one = torch.ones(1, 1)
        return op(reward.unsqueeze(-1), one, user, reward_weight, logprobs, ids, finished, **choice)

    return run


@pytest.fixture(params=["python", "op", pytest.param("emulated", marks=emulated.needed)])
def rule(request):
    if request.param == "python":
        return choose
    return by_op(score_select if request.param == "op" else emulated.score_select)


@pytest.mark.parametrize(
    ("logprobs", "reward", "weight", "slot"),
    [
        ([-1.0, -2.0, -3.0], [0.0, 2.0, 2.0], 1.0, 1),
        ([-1.0, -2.0, -3.0], [0.0, 2.0, 2.0], 0.0, 0),
        ([-2.0, -1.0, -1.0], [0.0, 0.0, 0.0], 1.0, 1),  # the lower of equals
        ([-0.0, 0.0, -1.0], [0.0, -0.0, 0.0], 1.0, 0),
        ([-2.0, -1.0, -3.0], [NAN, INF, -INF], 0.0, 1),  # a weight of 0 looks at no reward
        ([-INF, -5.0, -INF], [9.0, 0.0, 9.0], 1.0, 1),  # -inf forbids
        ([-1.0, -2.0, -3.0], [-INF, 0.0, 0.0], 1.0, 1),
        ([-INF, -INF, -INF], [0.0, 0.0, 0.0], 1.0, 0),
        ([-1.0, -2.0, NAN], [0.0, 0.0, 0.0], 1.0, -1),
        ([-1.0, -2.0, -3.0], [0.0, NAN, 0.0], 1.0, -1),
        ([-1.0, -2.0, -3.0], [0.0, 0.0, INF], 1.0, -1),
        ([-1.0, -2.0, -3.0], [0.0, 0.0, BIG], 2.0, -1),
        ([-1.0, -2.0, -3.0], [0.0, 0.0, -BIG], 2.0, -1),  # beyond float32, though it would not have been chosen
        ([-1.0, -2.0, -3.0], [0.0, 0.0, 0.0], NAN, -1),
    ],
)
@pytest.mark.parametrize("sampled", [False, True])
def test_the_slot(rule, logprobs, reward, weight, slot, sampled):
    """Sampled next to temperature 0 it is the best one, too, but for equals."""
    noise = {"temperature": 1e-3, "uniform": torch.tensor([0.25])} if sampled else {}
    ids = torch.tensor([[7, 5, 3]])
    got = rule(
        torch.tensor([logprobs]), torch.tensor([reward]), torch.tensor([weight]), ids, torch.tensor([False]), pad_id=9, **noise
    )
    assert [part.tolist() for part in got[:2]] == [[9 if slot < 0 else ids[0, slot].item()], [slot]]
    assert got[3].tolist() == [slot < 0]
    torch.testing.assert_close(got[2], torch.tensor([reward]), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("uniform", "slot"), [(0.0, 1), (0.24, 1), (0.25, 2), (0.5, 3), (0.74, 3), (0.75, 4), (1 - 2**-24, 4)]
)
def test_the_first_whose_cumulated_probability_exceeds_the_noise(rule, uniform, slot):
    """Of four equals, a quarter each; the first candidate is forbidden."""
    got = rule(
        torch.tensor([[-INF, -3.0, -3.0, -3.0, -3.0]]),
        torch.zeros(1, 5),
        torch.ones(1),
        torch.arange(5).unsqueeze(0),
        torch.tensor([False]),
        temperature=0.7,
        uniform=torch.tensor([uniform]),
    )
    assert got[1].tolist() == [slot]


def test_what_stops_and_what_has_finished(rule):
    """Row 0 goes on, 1 chooses a stop token, 2 had finished, 3 had finished with numbers that are none."""
    logprobs = torch.tensor([[-1.0, -2.0], [-2.0, -1.0], [-1.0, -2.0], [NAN, NAN]])
    token, slot, reward, finished = rule(
        logprobs,
        torch.full((4, 2), 0.5),
        torch.ones(4),
        torch.tensor([[4, 6]] * 4),
        torch.tensor([False, False, True, True]),
        stop=torch.tensor([8, 6]),
        pad_id=1,
    )
    assert token.tolist() == [4, 6, 1, 1] and slot.tolist() == [0, 1, 0, 0] and finished.tolist() == [False, True, True, True]
    assert reward.tolist() == [[0.5, 0.5], [0.5, 0.5], [0.0, 0.0], [0.0, 0.0]]
