"""score_select with a bank: every row's own MLP and the choice in one launch."""

from __future__ import annotations

import math

import emulated
import pytest
import torch
from choices import differing
from hypothesis import given, settings
from hypothesis import strategies as st
from scored import DTYPES, agree, grid, positional, problem
from states import copied, same_state, state_of

from pyargs.ops import score_select, score_select_reference, score_step, score_step_reference, user_mlp
from pyargs.ops.score_select import ACTIVATIONS

NAN = math.nan
both = pytest.mark.parametrize("op", [score_select, pytest.param(emulated.score_select, marks=emulated.needed)])


def with_bank(batch=3, k=4, dim=8, units=6, users=5, seed=0, dtype=torch.float32, bank_dtype=None, **more) -> dict:
    args = problem(batch=batch, k=k, hidden=units, users=users, seed=seed, **more)
    g = torch.Generator().manual_seed(seed + 1)
    given = {"features": grid((batch, k, dim), g, dtype), "bank": grid((users, units, dim), g, bank_dtype or dtype)}
    return args | given | {"reward_weight": args["reward_weight"] / 8}


def random(batch: int, k: int, dim: int, units: int, dtype=torch.float32, **more) -> dict:
    """Values that no sum is exact for."""
    g = torch.Generator().manual_seed(0)
    args = with_bank(batch, k, dim, units, dtype=dtype, bias=True, **more)
    for name in ("features", "bank", "weight", "bias"):
        args[name] = torch.randn(args[name].shape, generator=g).to(args[name].dtype)
    args["logprobs"] = -torch.rand(batch, k, generator=g).sort(-1).values
    args["ids"], args["finished"] = torch.arange(batch * k).view(batch, k), torch.zeros(batch, dtype=torch.bool)
    return args | {"activation": "relu", "scale": 0.01, "reward_weight": torch.full((batch,), 0.37)}


def of_row(args: dict, row: int) -> dict:
    names = "features", "user", "reward_weight", "logprobs", "ids", "finished", "uniform", "count"
    return args | {name: args[name][row : row + 1].clone() for name in names if name in args}


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_like_the_reference(data):
    drawn(data, score_select)


@emulated.needed
@settings(max_examples=20, deadline=None)  # half a second each
@given(data=st.data())
def test_the_cuda_kernel_emulated(data):
    emulated.order(data.draw(st.integers(0, 99), "order of threads and blocks"))
    drawn(data, emulated.score_select)


def drawn(data, op) -> None:
    draw = data.draw
    args = with_bank(
        batch=draw(st.integers(0, 4), "batch"),
        k=draw(st.one_of(st.integers(1, 13), st.sampled_from([24, 25, 40, 64])), "k"),
        dim=draw(st.one_of(st.integers(1, 70), st.sampled_from([576, 1025])), "dim"),
        units=draw(st.one_of(st.integers(1, 20), st.sampled_from([32, 33, 70])), "units"),
        users=draw(st.integers(1, 6), "users"),
        seed=draw(st.integers(0, 99), "seed"),
        dtype=draw(st.sampled_from(DTYPES), "dtype"),
        bank_dtype=draw(st.sampled_from(DTYPES), "dtype of the bank"),
        bias=draw(st.booleans(), "bias"),
        shared_weight=draw(st.booleans(), "shared weight"),
        stop=draw(st.sampled_from([(), (1, 2, 3, 4, 5, 6)]), "stop"),
    )
    batch, k, _ = args["features"].shape
    args["activation"] = draw(st.sampled_from(["identity", "relu"]), "activation")  # exact on the grid
    args["pad_id"] = draw(st.integers(-1, 3), "pad")
    if draw(st.booleans(), "sampled"):
        args["temperature"] = draw(st.sampled_from([0.25, 1.0, 3.0]), "temperature")
        args["uniform"] = torch.rand(batch, generator=torch.Generator().manual_seed(5))
    args |= differing(data, batch, k, "uniform" in args)
    if "stop" in args and draw(st.booleans(), "stop reward"):
        args["stop_reward"] = torch.full((batch,), 0.75)
    if batch and draw(st.booleans(), "bad user"):
        args["user"][0] = draw(st.sampled_from([-1, 6, 2**40]), "which")
    for name in ("features", "bank"):
        if draw(st.booleans(), f"{name} at any address"):
            flat = torch.full((3 + args[name].numel(),), NAN, dtype=args[name].dtype)
            args[name] = flat[3:].view(args[name].shape).copy_(args[name])
    agree(args, op=op)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_it_is_both_ops_one_after_the_other(capability, activation):
    args = random(5, 11, 577, 37) | {"activation": activation}
    features = user_mlp(args["features"], args["bank"], args["user"])
    one, two = score_select(**args), score_select(**args | {"features": features, "bank": None})
    assert all(torch.equal(got, expected) for got, expected in zip(one, two, strict=True))


@emulated.needed
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_the_same_in_any_order_of_threads_and_batch(dtype, activation):
    args = random(3, 26, 300, 37, dtype) | {"activation": activation}
    emulated.order(0)
    first = agree(args, op=emulated.score_select)
    emulated.order(1)
    assert all(torch.equal(one, two) for one, two in zip(emulated.score_select(**args), first, strict=True))
    for row in range(3):
        alone = emulated.score_select(**of_row(args, row))
        assert all(torch.equal(one[0], two[row]) for one, two in zip(alone, first, strict=True))


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 12, 13, 25])
def test_a_count_is_a_shorter_list(op, dtype, count):
    """Bit for bit: tensor cores are chosen by how many candidates the row has, and not by how many another has."""
    args = random(1, 26, 300, 20, dtype)
    args["features"][:, count:] = NAN
    shorter = args | {name: args[name][:, :count] for name in ("features", "logprobs", "ids")}
    got, expected = op(**args, count=torch.tensor([count])), op(**shorter)
    assert torch.equal(got[2][:, :count], expected[2]) and not got[2][:, count:].any()
    assert all(torch.equal(got[i], expected[i]) for i in (0, 1, 3))


@both
def test_nothing_of_a_finished_row_or_an_unknown_user_is_read(op):
    args = with_bank(users=5) | {"user": torch.tensor([2**40, -1, 4]), "finished": torch.tensor([True, False, False])}
    token, slot, reward, finished = agree(args | {"pad_id": 9}, op=op)
    assert token[:2].tolist() == [9, 9] and slot[:2].tolist() == [0, -1] and finished[:2].all()
    assert not reward[0].any() and reward[1].isnan().all() and reward[2].isfinite().all()


@both
@pytest.mark.parametrize("shared", [("bank",), ("weight", "bias"), ("bank", "weight", "bias")])
def test_parts_that_all_users_share(op, shared):
    args = with_bank(bias=True)
    args |= {name: args[name][:1] for name in shared} | {"activation": "relu"}
    if len(shared) == 3:
        args["user"] = torch.tensor([-7, 99, 2**40])  # which is not read
    agree(args, op=op)


steps = pytest.mark.parametrize("op", [score_step, pytest.param(emulated.score_step, marks=emulated.needed)])


@steps
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_keeps_what_the_reference_does(op, dtype):
    """With filters: how many candidates a row has is found on the way."""
    args = {name: part for name, part in random(3, 17, 40, 20, dtype).items() if name not in ("finished", "reward_weight")}
    filters = dict(own_k=torch.tensor([17, 3, 17]), top_p=torch.full((3,), 0.9).double(), min_p=torch.zeros(3).double())
    one = state_of(3, so_far=torch.ones(3), total=torch.zeros(3), **filters)
    other = copied(one)
    op(**args, state=one)
    score_step_reference(**args, state=other)
    same_state(one, other)


@emulated.needed
def test_more_than_64_candidates_are_refused_by_the_cuda_kernel():
    with pytest.raises(RuntimeError, match="k must be at most 64"):
        emulated.score_select(**with_bank(k=65) | {"ids": torch.zeros(3, 65, dtype=torch.int64)})


WRONG = [
    ({"bank": torch.zeros(5, 8)}, ValueError, "bank must have shape"),
    ({"bank": torch.zeros(5, 6, 9)}, ValueError, r"bank must have shape \[any, any, 8\]"),
    ({"bank": torch.zeros(5, 7, 8)}, ValueError, r"weight must have shape \[any, 7\]"),
    ({"bank": torch.zeros(5, 0, 8), "weight": torch.zeros(5, 0)}, ValueError, "at least one row"),
    ({"bank": torch.zeros(0, 6, 8)}, ValueError, "at least one row"),
    ({"bank": torch.zeros(4, 6, 8)}, ValueError, "weight has 5 users but bank 4"),
    ({"bank": torch.zeros(5, 6, 8).int()}, TypeError, "bank"),
    ({"bank": [1.0]}, TypeError, "torch.Tensor"),
    ({"bank": torch.zeros(5, 6, 8, device="meta")}, ValueError, "one device"),
]


@pytest.mark.parametrize("function", [score_select, score_select_reference])
@pytest.mark.parametrize(("change", "error", "says"), WRONG)
def test_errors_name_the_fix(function, change, error, says):
    with pytest.raises(error, match=says):
        function(**(with_bank() | change))


def test_direct_call_is_checked():
    for change, _, _ in WRONG:
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            torch.ops.pyargs.score_select(*positional(with_bank() | change))


def test_opcheck():
    for args in (with_bank(), with_bank(bias=True, dtype=torch.bfloat16), with_bank(batch=0)):
        torch.library.opcheck(torch.ops.pyargs.score_select.default, positional(args))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    compiled = torch.compile(lambda **args: score_select(**args), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3):
        args = with_bank(batch=batch)
        assert all(torch.equal(one, two) for one, two in zip(compiled(**args), score_select(**args), strict=True))
