from __future__ import annotations

import math

import emulated
import pytest
import torch
from choices import WRONG_CHOICES, differing
from hypothesis import given, settings
from hypothesis import strategies as st
from scored import DTYPES, agree, positional, problem

from pyargs import ops
from pyargs.ops import score_select, score_select_reference
from pyargs.ops.score_select import ACTIVATIONS, _default

INF, NAN = math.inf, math.nan


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_like_the_reference(data):
    drawn(data, score_select)


@emulated.needed
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_the_cuda_kernel_emulated(data):
    emulated.order(data.draw(st.integers(0, 99), "order of threads and blocks"))
    drawn(data, emulated.score_select)


def drawn(data, op) -> None:
    draw = lambda strategy, label: data.draw(strategy, label)  # noqa: E731
    activation = draw(st.sampled_from(["identity", "relu"]), "activation")  # exact on the grid
    args = problem(
        batch=draw(st.integers(0, 5), "batch"),
        k=draw(st.integers(1, 64), "k"),
        hidden=draw(st.one_of(st.integers(1, 70), st.sampled_from([576, 1023, 1024, 1025, 2100])), "hidden"),
        users=draw(st.integers(1, 6), "users"),
        seed=draw(st.integers(0, 99), "seed"),
        dtype=draw(st.sampled_from(DTYPES), "dtype"),
        bias=draw(st.booleans(), "bias"),
        shared_weight=draw(st.booleans(), "shared weight"),
        stop=draw(st.sampled_from([(), (7,), (1, 2, 3, 4, 5, 6)]), "stop"),
    )
    args["activation"] = activation
    args["scale"] = draw(st.sampled_from([1.0, 0.5, -2.0]), "scale")
    args["pad_id"] = draw(st.integers(-1, 3), "pad")
    args["weight"] = args["weight"].to(draw(st.sampled_from(DTYPES), "dtype of the weight"))
    batch = len(args["user"])
    if draw(st.booleans(), "sampled"):
        args["temperature"] = draw(st.sampled_from([0.25, 1.0, 3.0]), "temperature")
        args["uniform"] = torch.rand(batch, generator=torch.Generator().manual_seed(5))
    args |= differing(data, batch, args["features"].shape[1], "uniform" in args)
    if "stop" in args and draw(st.booleans(), "stop reward"):
        args["stop_reward"] = torch.full((batch,), 0.75)
    if batch and draw(st.booleans(), "bad user"):
        args["user"][0] = draw(st.sampled_from([-1, 6, 2**40]), "which")
    if draw(st.booleans(), "rows at any address"):
        flat = torch.full((3 + args["features"].numel(),), NAN, dtype=args["features"].dtype)
        args["features"] = flat[3:].view(args["features"].shape).copy_(args["features"])
    agree(args, op=op)


@emulated.needed
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations_and_orders_emulated(dtype, activation):
    """Values that no sum is exact for: within 2e-5, bitwise the same in any order of threads and any batch."""
    args = problem(batch=3, k=10, hidden=2100, dtype=dtype, bias=True)
    args["features"] = (torch.randn(3, 10, 2100, generator=torch.Generator().manual_seed(0)) * 2).to(dtype)
    args |= {"activation": activation, "scale": 0.01, "reward_weight": torch.full((3,), 0.37)}
    args["logprobs"] = torch.linspace(0, -2, 10).repeat(3, 1) ** 3
    emulated.order(0)
    first = agree(args, op=emulated.score_select)
    for seed in (1, 2):
        emulated.order(seed)
        for got, expected in zip(emulated.score_select(**args), first, strict=True):
            assert torch.equal(got, expected)
        for row in range(3):
            names = ("features", "user", "reward_weight", "logprobs", "ids", "finished")
            alone = emulated.score_select(**args | {name: args[name][row : row + 1].clone() for name in names})
            for got, expected in zip(alone, first, strict=True):
                assert torch.equal(got[0], expected[row])


@emulated.needed
def test_special_scores_emulated():
    special_scores(emulated.score_select)


@emulated.needed
def test_more_than_64_candidates_are_refused_by_the_cuda_kernel():
    with pytest.raises(RuntimeError, match="k must be at most 64"):
        emulated.score_select(**problem(k=65) | {"ids": torch.zeros(3, 65, dtype=torch.int64)})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("hidden", [1, 15, 16, 33, 576, 1500])
def test_every_capability(capability, dtype, activation, hidden):
    for bias in (False, True):
        args = problem(batch=9, k=10, hidden=hidden, dtype=dtype, bias=bias, seed=hidden)
        args["features"] = args["features"] * 3
        args["activation"] = activation
        args["scale"] = 1 / hidden
        # gelu and leaky_relu are not exact: no near-ties between the candidates, so that the slots must agree
        args["logprobs"] = torch.linspace(0, -2, 10).repeat(9, 1) ** 3
        args["reward_weight"] = torch.full((9,), 0.37)
        agree(args, atol=2e-5)


def test_gelu_is_the_exact_form(capability):
    x = torch.linspace(-12, 12, 4001)
    args = problem(batch=1, k=4001, hidden=1)
    args |= {"features": x.view(1, -1, 1), "weight": torch.ones(1, 1), "finished": torch.tensor([False]), "activation": "gelu"}
    args |= {"ids": torch.arange(4001)[None], "logprobs": torch.zeros(1, 4001)}
    reward = score_select(**args)[2][0]
    assert (reward - torch.nn.functional.gelu(x.double())).abs().max() < 2e-6


def test_activations_at_their_limits(capability):
    limits(score_select)


@emulated.needed
def test_activations_at_their_limits_emulated():
    limits(emulated.score_select)


def limits(op) -> None:
    """What each activation tends to, in vectors of every width: gelu(-inf) is 0, and only NaN is NaN."""
    points = [INF, -INF, NAN, 3e38, -3e38, -150.0, 150.0, -0.0, 1e-40, -1e-40, 65504.0, -65504.0]
    expected = {
        "identity": points,
        "relu": [INF, 0, NAN, 3e38, 0, 0, 150, 0, 1e-40, 0, 65504, 0],
        "gelu": [INF, 0, NAN, 3e38, 0, 0, 150, 0, 5e-41, -5e-41, 65504, 0],
        "leaky_relu": [INF, -INF, NAN, 3e38, -6e37, -30, 150, 0, 1e-40, -2e-41, 65504, -13100.8],
    }
    k = len(points)
    for hidden in (1, 40):  # the others are 0, whose activation is
        args = problem(batch=1, k=k, hidden=hidden) | {"finished": torch.tensor([False]), "ids": torch.arange(k)[None]}
        args |= {"features": torch.zeros(1, k, hidden), "weight": torch.ones(1, hidden), "logprobs": torch.zeros(1, k)}
        args["features"][0, :, hidden // 2] = torch.tensor(points)
        for activation, values in expected.items():
            for dtype in DTYPES:
                given = args | {"features": args["features"].to(dtype), "activation": activation}
                reward = agree(given, op=op)[2]
                if dtype == torch.float32:
                    torch.testing.assert_close(reward[0], torch.tensor(values), rtol=1e-6, atol=1e-30, equal_nan=True)


def test_weight_zero_is_greedy_whatever_the_reward():
    args = problem()
    args["finished"] = torch.zeros(3, dtype=torch.bool)
    args["features"][:] = NAN
    args["reward_weight"] = torch.tensor([0.0, -0.0, 1.0])
    token, slot, _, finished = agree(args)
    assert slot.tolist() == [0, 0, -1] and finished.tolist() == [False, False, True]
    assert token.tolist() == [*args["ids"][:2, 0].tolist(), 0]


def test_ties_go_to_the_lower_slot():
    args = problem(batch=2, k=6)
    args |= {"features": torch.zeros(2, 6, 8), "logprobs": torch.full((2, 6), -1.5), "finished": torch.zeros(2).bool()}
    assert agree(args)[1].tolist() == [0, 0]
    args["logprobs"] = torch.tensor([[-2.0, -1.0, -1.0, -3, -1, -1], [-INF, -INF, -INF, 0.0, -0.0, -5]])
    assert agree(args)[1].tolist() == [1, 3]


def test_special_scores(capability):
    special_scores(score_select)


def special_scores(op) -> None:
    rows = [[NAN, 0, 1], [0, NAN, 1], [-INF, -INF, -INF], [-INF, 0, INF], [INF, INF, 0], [-INF, -INF, -3]]
    args = problem(batch=6, k=3)
    args |= {"features": torch.zeros(6, 3, 8), "logprobs": torch.tensor(rows), "finished": torch.zeros(6).bool(), "pad_id": 49}
    token, slot, _, finished = agree(args, op=op)
    assert slot.tolist() == [-1, -1, 0, -1, -1, 2]
    assert token[:2].tolist() == [49, 49] and finished.tolist() == [True, True, False, True, True, False]
    sampled = agree(args | {"temperature": 1.0, "uniform": torch.full((6,), 0.9)}, op=op)[1]
    assert sampled.tolist() == [-1, -1, 0, -1, -1, 2]


def test_what_overflows_is_no_choice(capability):
    overflow(score_select)


@emulated.needed
def test_what_overflows_is_no_choice_emulated():
    overflow(emulated.score_select)


def overflow(op) -> None:
    """w r beyond float32 among the candidates, though w and r are numbers: no order is left, and no first one wins."""
    cases = [  # rewards, weight, slot
        ([2.0, 3.0, 1.0], 3e38, -1),
        ([-2.0, -3.0, -4.0], 3e38, -1),
        ([0.5, -3.0, 0.25], 3e38, -1),
        ([2.0, 3.0, 1.0], -3e38, -1),
        ([0.5, 0.75, 0.25], 3e38, 1),
        ([-INF, 0.75, 0.25], 1.0, 1),  # forbidden, which is no overflow
        ([-INF, -INF, -INF], 1.0, 0),
        ([INF, 0.0, 0.0], 1.0, -1),
        ([INF, 0.0, 0.0], -1.0, -1),
        ([INF, 0.0, NAN], 0.0, 0),
    ]
    rewards, weight, slots = (list(column) for column in zip(*cases, strict=True))
    args = problem(batch=len(cases), k=3, hidden=1, users=1) | {"weight": torch.ones(1, 1)}
    args |= {"features": torch.tensor(rewards).unsqueeze(-1), "reward_weight": torch.tensor(weight)}
    args |= {"logprobs": torch.tensor([-1.0, -2.0, -3.0]).repeat(len(cases), 1), "finished": torch.zeros(len(cases)).bool()}
    for sampling in ({}, {"temperature": 1e-3, "uniform": torch.full((len(cases),), 0.5)}):
        assert agree(args | sampling, op=op)[1].tolist() == slots


def test_bad_user_rows(capability):
    args = problem(batch=4, users=5, stop=(3,))
    args |= {"user": torch.tensor([-1, 5, 4, 2**62]), "finished": torch.tensor([False, False, False, True])}
    args["stop_reward"] = torch.ones(4)
    token, slot, reward, finished = agree(args)
    assert slot.tolist()[:2] == [-1, -1] and slot[2] >= 0 and slot[3] == 0
    assert reward[:2].isnan().all() and reward[2].isfinite().all() and (reward[3] == 0).all()
    assert finished.tolist() == [True, True, bool(token[2] == 3), True]
    args = problem(batch=2, shared_weight=True) | {"user": torch.tensor([-7, 99])}
    assert (agree(args)[1] >= 0).all()  # one head for all: the row is not read


def test_finished_rows_are_not_read():
    args = problem(batch=2, stop=(7,)) | {"pad_id": 13, "finished": torch.tensor([True, True])}
    args["features"][:], args["logprobs"][:], args["user"][:] = NAN, NAN, -5
    token, slot, reward, finished = agree(args)
    assert token.tolist() == [13, 13] and slot.tolist() == [0, 0] and not reward.any() and finished.all()


def test_stop_tokens_finish_and_take_their_own_reward():
    args = problem(batch=2, k=3, hidden=2)
    args |= {"ids": torch.tensor([[5, 9, 8], [5, 6, 8]]), "finished": torch.zeros(2).bool(), "stop": torch.tensor([9, 10])}
    args |= {"logprobs": torch.zeros(2, 3), "reward_weight": torch.ones(2), "stop_reward": torch.tensor([50.0, 50.0])}
    token, slot, reward, finished = agree(args)
    assert token[0] == 9 and reward[0, 1] == 50.0 and finished.tolist() == [True, False]


def test_sampling_follows_the_distribution(capability):
    draws = 20000
    args = problem(batch=draws, k=4, hidden=2)
    args |= {"logprobs": torch.tensor([0.4, 0.3, 0.2, 0.1]).log().repeat(draws, 1), "reward_weight": torch.zeros(draws)}
    args |= {"finished": torch.zeros(draws).bool(), "temperature": 1.0}
    args["uniform"] = torch.rand(draws, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(agree(args)[1], minlength=4) / draws
    torch.testing.assert_close(share, torch.tensor([0.4, 0.3, 0.2, 0.1]), atol=0.02, rtol=0)
    args["temperature"] = 1e-3
    assert (agree(args)[1] == 0).all()


def test_last_possible_slot_where_rounding_leaves_none(capability):
    args = problem(batch=1, k=4, hidden=2)
    args |= {
        "logprobs": torch.tensor([[0.0, -1.0, -2.0, -1e6]]),
        "reward_weight": torch.zeros(1),
        "finished": torch.tensor([False]),
    }
    args |= {"temperature": 1.0, "uniform": torch.ones(1)}  # beyond [0, 1): as if the sum had stopped short
    assert agree(args)[1].tolist() == [2]


def test_bitwise_the_same_in_any_batch_and_with_any_threads(capability, with_threads):
    g = torch.Generator().manual_seed(0)
    args = problem(batch=64, k=10, hidden=577, users=9, bias=True) | {"activation": "gelu"}
    args["features"], args["weight"] = torch.randn(64, 10, 577, generator=g), torch.randn(9, 577, generator=g)
    first = with_threads(1, lambda: score_select(**args))
    for threads in (1, 2, 3):
        for got, expected in zip(with_threads(threads, lambda: score_select(**args)), first, strict=True):
            assert torch.equal(got, expected)
    for row in (0, 1, 33, 63):
        one = {n: t[row : row + 1].clone() if n not in ("weight", "bias", "activation") else t for n, t in args.items()}
        for got, expected in zip(score_select(**one), first, strict=True):
            assert torch.equal(got[0], expected[row])


def test_strides():
    args = problem(batch=4, k=3, hidden=6, bias=True, stop=(1, 2, 3))
    wide = torch.zeros(4, 7, 12)
    wide[:, 2:5, 3:9] = args["features"]
    agree(args | {"features": wide[:, 2:5, 3:9]})
    agree(args | {"features": args["features"].transpose(1, 2).contiguous().transpose(1, 2)})
    agree(args | {"weight": args["weight"].T.contiguous().T, "bias": args["bias"].T.contiguous().T})
    agree(args | {"logprobs": args["logprobs"].T.contiguous().T, "ids": args["ids"].T.contiguous().T})
    agree(args | {"user": torch.tensor([1, 9, 2, 9, 0, 9, 3, 9])[::2], "finished": torch.zeros(1).bool().expand(4)})
    agree(args | {"reward_weight": torch.ones(1).expand(4), "stop": torch.tensor([1, 0, 2, 0])[::2]})


def test_empty_batch():
    token, slot, reward, finished = agree(problem(batch=0))
    assert token.shape == slot.shape == finished.shape == (0,) and reward.shape == (0, 4)


WRONG = [
    ({"features": torch.zeros(3, 8)}, ValueError, r"\[B, k, H\]"),
    ({"features": torch.zeros(3, 4, 8, dtype=torch.float64)}, TypeError, "features"),
    ({"features": torch.zeros(3, 0, 8), "logprobs": torch.zeros(3, 0), "ids": torch.zeros(3, 0).long()}, ValueError, "k >= 1"),
    ({"weight": torch.zeros(5, 7)}, ValueError, "weight"),
    ({"weight": torch.zeros(0, 8)}, ValueError, "at least one row"),
    ({"weight": torch.zeros(5, 8).int()}, TypeError, "weight"),
    ({"bias": torch.zeros(4, 8)}, ValueError, "5 users but bias 4"),
    ({"user": torch.zeros(3, dtype=torch.int32)}, TypeError, "user"),
    ({"user": torch.zeros(4, dtype=torch.int64)}, ValueError, "user"),
    ({"user": [0, 1, 2]}, TypeError, "torch.Tensor"),
    ({"reward_weight": torch.ones(3).double()}, TypeError, "reward_weight"),
    ({"logprobs": torch.zeros(3, 5)}, ValueError, "logprobs"),
    ({"ids": torch.zeros(3, 4)}, TypeError, "ids"),
    ({"finished": torch.zeros(3)}, TypeError, "finished"),
    ({"finished": torch.zeros(3, device="meta").bool()}, ValueError, "one device"),
    ({"weight": torch.zeros(5, 8, device="meta")}, ValueError, "one device"),
    ({"activation": "tanh"}, ValueError, "identity, relu, gelu, leaky_relu"),
    ({"stop_reward": torch.zeros(3)}, ValueError, "needs stop"),
    *WRONG_CHOICES,
]


@pytest.mark.parametrize("function", [score_select, score_select_reference])
@pytest.mark.parametrize(("change", "error", "says"), WRONG)
def test_errors_name_the_fix(function, change, error, says):
    with pytest.raises(error, match=says):
        function(**(problem() | change))


def rows_apart(args: dict) -> dict:
    """With stops, counts and temperatures of each row its own."""
    batch = len(args["user"])
    given = {"stop": torch.tensor([[1, -1], [2, 3], [4, 5]])[:batch], "count": torch.tensor([1, 4, 2])[:batch]}
    return args | given | {"temperature": torch.tensor([0.0, 0.5, 2.0])[:batch], "uniform": torch.full((batch,), 0.4)}


def test_direct_call_is_checked():
    for change, _, _ in WRONG:
        if "activation" in change:  # there a number
            continue
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            torch.ops.pyargs.score_select(*positional(problem() | change))


def test_opcheck():
    shared = problem(bias=True, shared_weight=True, stop=(3, 4))
    for args in (problem(), shared, problem(dtype=torch.bfloat16), rows_apart(problem())):
        torch.library.opcheck(torch.ops.pyargs.score_select.default, positional(args))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def step(**args):
        token, slot, reward, finished = score_select(**args, activation="relu", pad_id=3)
        return token + 1, slot, reward * 2, ~finished

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3):
        shared = problem(batch=batch, bias=True, stop=(1, 2))
        for args in (shared, rows_apart(shared)):
            for got, expected in zip(compiled(**args), step(**args), strict=True):
                assert torch.equal(got, expected)


def test_schema_is_that_of_the_default():
    inferred = torch.library.infer_schema(_default, mutates_args=()).replace("scale=1.0", "scale=1.")
    assert str(torch.ops.pyargs.score_select.default._schema) == f"pyargs::score_select{inferred}"


def test_native_here():
    pytest.importorskip("pyargs._C")
    assert "score_select" in ops.native
