"""The rule of the choice on cases by hand: in PyTorch, in the op, and in the CUDA kernel emulated. And that each row of the
ops that choose is a request of its own."""

from __future__ import annotations

import math

import emulated
import pytest
import torch
from choices import differing
from hypothesis import given, settings
from hypothesis import strategies as st

from pyargs.ops import score_select, tokenwise_select
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


def test_each_row_has_its_own_count_temperature_and_stop(rule):
    """The same candidates in all rows, of which the third is the best and all are about as likely at temperature 1000."""
    rows = [  # count, temperature, stop, slot, finished
        (3, 0.0, [8, -1], 2, False),
        (2, 0.0, [6, -1], 1, True),
        (1, 1000.0, [6, -1], 0, False),
        (2, 1000.0, [-1, -1], 1, False),
        (3, 1000.0, [9, 3], 2, True),
        (3, -0.0, [3, 4], 2, True),
        (0, 1.0, [8, 8], -1, True),
        (4, 1.0, [8, 8], -1, True),
        (-(2**62), 1.0, [8, 8], -1, True),
        (2**62, 1.0, [8, 8], -1, True),
        (3, -1.0, [8, 8], -1, True),
        (3, NAN, [8, 8], -1, True),
        (3, INF, [8, 8], -1, True),
    ]
    count, temperature, stop, slots, over = (list(column) for column in zip(*rows, strict=True))
    batch = len(rows)
    token, slot, reward, finished = rule(
        torch.tensor([[-3.0, -2.0, -1.0]]).repeat(batch, 1),
        torch.full((batch, 3), 0.5),
        torch.ones(batch),
        torch.tensor([[4, 6, 3]]).repeat(batch, 1),
        torch.zeros(batch, dtype=torch.bool),
        stop=torch.tensor(stop),
        pad_id=1,
        temperature=torch.tensor(temperature),
        uniform=torch.full((batch,), 0.9),
        count=torch.tensor(count),
    )
    assert slot.tolist() == slots and finished.tolist() == over
    assert token.tolist() == [1 if s < 0 else [4, 6, 3][s] for s in slots]
    assert reward.tolist() == [[0.5 if 1 <= n <= 3 and j < n else 0.0 for j in range(3)] for n in count]


def test_what_lies_behind_the_count_is_not_read(rule):
    """Neither NaN nor what would have been better nor what would have stopped."""
    for noise in ({}, {"temperature": 1e-3, "uniform": torch.tensor([0.5, 0.5])}):
        token, slot, reward, finished = rule(
            torch.tensor([[-2.0, -1.0, NAN, NAN], [-2.0, -1.0, 5.0, INF]]),
            torch.tensor([[0.5, 0.5, NAN, INF], [0.5, 0.5, 9.0, 9.0]]),
            torch.ones(2),
            torch.tensor([[4, 6, -(2**62), 6], [4, 6, 3, 3]]),
            torch.tensor([False, False]),
            stop=torch.tensor([3]),
            count=torch.tensor([2, 2]),
            **noise,
        )
        assert token.tolist() == [6, 6] and slot.tolist() == [1, 1] and finished.tolist() == [False, False]
        assert reward.tolist() == [[0.5, 0.5, 0.0, 0.0]] * 2


def test_a_finished_row_may_have_any_count_and_temperature(rule):
    token, slot, reward, finished = rule(
        torch.zeros(3, 2),
        torch.ones(3, 2),
        torch.ones(3),
        torch.tensor([[4, 6]] * 3),
        torch.ones(3, dtype=torch.bool),
        pad_id=1,
        temperature=torch.tensor([NAN, -1.0, 1.0]),
        uniform=torch.zeros(3),
        count=torch.tensor([0, 7, -1]),
    )
    assert token.tolist() == [1] * 3 and slot.tolist() == [0] * 3 and not reward.any() and finished.all()


OPS = {
    "score_select": score_select,
    "tokenwise_select": tokenwise_select,
    "score_select emulated": pytest.param(emulated.score_select, marks=emulated.needed),
    "tokenwise_select emulated": pytest.param(emulated.tokenwise_select, marks=emulated.needed),
}
of_ops = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def numbers(op, batch: int, k: int, seed: int) -> dict:
    """Arguments of one of the ops; sums of these are exact in no order."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    args = {"reward_weight": random(batch), "finished": torch.rand(batch, generator=generator) < 0.2, "pad_id": 99}
    args |= {"uniform": torch.rand(batch, generator=generator), "temperature": 0.7, "stop": torch.tensor([5, 6, 7])}
    if "tokenwise" in op.__name__:
        return args | {"logits": random(batch, 80) * 5, "reward_logits": random(batch, 80), "k": k}
    args |= {"features": random(batch, k, 33), "weight": random(6, 33), "user": torch.arange(batch) % 6}
    args |= {"stop_reward": random(batch), "bias": random(1, 33), "activation": "gelu", "logprobs": random(batch, k)}
    return args | {"ids": torch.randint(80, (batch, k), generator=generator)}


def one_row(args: dict, row: int) -> dict:
    shared = ("weight", "bias", "stop") if args["stop"].dim() == 1 else ("weight", "bias")
    return {
        name: value[row : row + 1].clone() if isinstance(value, torch.Tensor) and name not in shared else value
        for name, value in args.items()
    }


@of_ops
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_row_alone_is_the_row_in_any_company(op, data):
    """Bit for bit, whatever counts, temperatures and stop tokens the others have."""
    batch, k = data.draw(st.integers(1, 5), "batch"), data.draw(st.integers(1, 64), "k")
    args = numbers(op, batch, k, data.draw(st.integers(0, 99), "seed")) | differing(data, batch, k, sampled=True)
    together = op(**args)
    for row in range(batch):
        for alone, several in zip(op(**one_row(args, row)), together, strict=True):
            assert torch.equal(alone[0], several[row])


@of_ops
@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 4), k=st.integers(1, 64), seed=st.integers(0, 99), temperature=st.sampled_from([0.25, 0.7, 3.0]))
def test_rows_that_are_alike_may_share(op, batch, k, seed, temperature):
    """Counts of k, one temperature and one list of stops for all give bit for bit what numbers for all give."""
    each = torch.full((batch,), temperature)
    args = numbers(op, batch, k, seed) | {"temperature": each[0].item()}
    own = {"count": torch.full((batch,), k), "temperature": each, "stop": args["stop"].expand(batch, -1)}
    own["stop"] = torch.cat([own["stop"], torch.full((batch, 2), -1)], 1)
    for one, two in zip(op(**args), op(**args | own), strict=True):
        assert torch.equal(one, two)
    greedy = {name: value for name, value in args.items() if name not in ("temperature", "uniform")}
    for one, two in zip(op(**greedy), op(**args | own | {"temperature": each * 0}), strict=True):
        assert torch.equal(one, two)


@of_ops
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_count_is_a_shorter_list(op, data):
    """A row of k candidates with a count is, bit for bit, the row of as many candidates."""
    k = data.draw(st.integers(1, 64), "k")
    count = data.draw(st.integers(1, k), "count")
    args = numbers(op, 1, k, data.draw(st.integers(0, 99), "seed"))
    if data.draw(st.booleans(), "greedy"):
        args |= {"temperature": None, "uniform": None}
    names = () if "k" in args else ("features", "logprobs", "ids")
    shorter = args | {name: args[name][:, :count] for name in names} | ({} if names else {"k": count})
    for name in names[:2]:
        args[name][:, count:] = NAN
    got, expected = op(**args, count=torch.tensor([count])), op(**shorter)
    assert torch.equal(got[2][:, :count], expected[2]) and not got[2][:, count:].any()
    for i in (0, 1, 3):
        assert torch.equal(got[i], expected[i])
