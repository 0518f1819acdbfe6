from __future__ import annotations

import emulated
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scored import DTYPES, problem
from states import WRONG_STATES, copied, drawn_state, refused, same_state, state_of

from pyargs.ops import RowState, score_select, score_step, score_step_reference
from pyargs.ops.row_state import WRITTEN, choice_arguments
from pyargs.ops.score_select import ACTIVATIONS
from pyargs.ops.score_step import _default

SCORED = "features", "weight", "user", "logprobs", "ids"


def scored(**more) -> dict:
    """Arguments without a state."""
    given = problem(**more)
    return {name: given[name] for name in (*SCORED, "bias") if name in given}


def after(op, args: dict, state: RowState) -> RowState:
    """The state after a step from this one."""
    state = copied(state)
    assert op(**args, state=state) is None
    return state


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_like_the_reference(data):
    drawn(data, score_step)


@emulated.needed
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_the_cuda_kernel_emulated(data):
    emulated.order(data.draw(st.integers(0, 99), "order of threads and blocks"))
    drawn(data, emulated.score_step)


def drawn(data, op) -> None:
    draw = data.draw
    args = scored(
        batch=draw(st.integers(0, 5), "batch"),
        k=draw(st.integers(1, 64), "k"),
        hidden=draw(st.one_of(st.integers(1, 70), st.sampled_from([576, 1025, 2100])), "hidden"),
        users=draw(st.integers(1, 6), "users"),
        seed=draw(st.integers(0, 99), "seed"),
        dtype=draw(st.sampled_from(DTYPES), "dtype"),
        bias=draw(st.booleans(), "bias"),
        shared_weight=draw(st.booleans(), "shared weight"),
    )
    batch, k, _ = args["features"].shape
    args |= {
        "activation": draw(st.sampled_from(["identity", "relu"]), "activation"),
        "scale": draw(st.sampled_from([1.0, -2.0])),
    }
    args["pad_id"] = draw(st.integers(-1, 3), "pad")
    if batch and draw(st.booleans(), "bad user"):
        args["user"][0] = draw(st.sampled_from([-1, 6, 2**40]), "which")
    if draw(st.booleans(), "candidates in wider rows"):
        for name in ("logprobs", "ids"):
            wide = torch.full((batch, k + draw(st.integers(0, 3), f"more {name}")), -7, dtype=args[name].dtype)
            wide[:, :k] = args[name]
            args[name] = wide[:, :k]
    state = drawn_state(data, batch, k)
    got, expected = after(op, args, state), after(score_step_reference, args, state)
    same_state(got, expected)
    for name, part in got._asdict().items():  # nothing else is written
        assert name in WRITTEN or part is getattr(state, name) or torch.equal(part, getattr(state, name)) or part.isnan().any()


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_it_chooses_what_score_select_does(data):
    args = scored(batch=4, k=data.draw(st.integers(1, 12)), seed=data.draw(st.integers(0, 99)))
    state = drawn_state(data, 4, args["ids"].shape[1])
    token, slot, reward, finished = score_select(**args, **choice_arguments(state, args["logprobs"]), stop_reward=state.so_far)
    got, on = after(score_step, args, state), ~state.finished
    assert torch.equal(got.token, token) and torch.equal(got.chosen[:, 0].long(), token)
    assert torch.equal(got.chosen[:, 1].long(), slot) and torch.equal(got.slot, slot.masked_fill(got.finished, -1))
    own = reward.gather(1, slot.clamp(min=0).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(got.chosen[:, 2].float(), own, atol=0, rtol=0, equal_nan=True)
    assert torch.equal(got.step, state.step + on)
    assert torch.equal(got.finished, finished | (on & (got.step >= state.limit)))
    assert torch.equal(got.chosen[:, 4].bool(), got.finished)


@pytest.mark.parametrize("op", [score_step, pytest.param(emulated.score_step, marks=emulated.needed)])
def test_steps_in_a_row_are_bitwise_those_of_each_row_alone(op):
    """Sums, spreads and noise too: of values that no sum is exact for."""
    g = torch.Generator().manual_seed(0)
    args = scored(batch=5, k=10, hidden=577, bias=True) | {"activation": "gelu", "scale": 0.1}
    ordered = torch.randn(5, 10, generator=g).sort(descending=True).values
    state = state_of(
        5, so_far=torch.randn(5, generator=g), total=torch.randn(5, generator=g), temperature=torch.ones(5),
        noise=torch.rand(5, 4, generator=g), own_k=torch.tensor([10, 3, 10, 1, 7]), top_p=torch.full((5,), 0.8).double(),
        min_p=torch.full((5,), 0.01).double(), limit=torch.tensor([2, 9, 9, 1, 3]), stop=torch.arange(1, 6).view(5, 1),
    )  # fmt: skip
    cut = lambda row: RowState(*(None if part is None else part[row : row + 1].clone() for part in state))  # noqa: E731
    together, alone = copied(state), [cut(row) for row in range(5)]
    for step in range(3):
        args |= {"features": torch.randn(5, 10, 577, generator=g), "logprobs": ordered - step / 8}
        op(**args, state=together)
        for row, own in enumerate(alone):
            op(**args | {name: args[name][row : row + 1] for name in ("features", "user", "logprobs", "ids")}, state=own)
    for row, own in enumerate(alone):
        same_state(own, RowState(*(None if part is None else part[row : row + 1] for part in together)), bitwise=True)
    assert together.finished.any() and not together.finished.all()


def test_every_capability(capability):
    for k in (1, 10, 64):
        args = scored(batch=4, k=k, hidden=40)
        state = state_of(4, so_far=torch.zeros(4), total=torch.ones(4), step=torch.tensor([0, 1, 3, 7]))
        same_state(after(score_step, args, state), after(score_step_reference, args, state))


@pytest.mark.parametrize("function", [score_step, score_step_reference])
@pytest.mark.parametrize(("change", "error", "says"), WRONG_STATES)
def test_errors_name_the_fix(function, change, error, says):
    args = scored()
    refused(function, torch.ops.pyargs.score_step, tuple(args[name] for name in SCORED), state_of(), change, error, says)


@pytest.mark.parametrize("function", [score_step, score_step_reference])
def test_more_than_64_candidates_are_refused(function):
    with pytest.raises(ValueError, match="at most 64"):
        function(**scored(k=65) | {"ids": torch.zeros(3, 65, dtype=torch.int64)}, state=state_of())
    with pytest.raises(ValueError, match=", ".join(ACTIVATIONS)):
        function(**scored(), activation="tanh", state=state_of())


def test_tensors_of_autograd_and_of_inference_are_refused():
    with torch.inference_mode():
        state = state_of()
    with pytest.raises(RuntimeError, match="inference tensors"):
        score_step(**scored(), state=state)
    state = state_of(so_far=torch.zeros(3, requires_grad=True))
    with pytest.raises(RuntimeError, match="require grad"):
        score_step(**scored(), state=state)
    with torch.no_grad():
        score_step(**scored(), state=state)
    version = state.step._version
    with torch.no_grad():
        score_step(**scored(), state=state)
    assert state.step._version > version


def positional(args: dict, state: RowState) -> tuple:
    return (*(args[name] for name in SCORED), *state, args.get("bias"), 1, 1.0, 0)


def states() -> list[RowState]:
    own = dict(own_k=torch.tensor([1, 4, 2]), top_p=torch.full((3,), 0.9).double(), min_p=torch.zeros(3).double())
    heat = dict(temperature=torch.tensor([0.0, 0.5, 2.0]), noise=torch.full((3, 2), 0.4))
    return [state_of(), state_of(so_far=torch.zeros(3), total=torch.zeros(3), **own, **heat)]


def test_opcheck():
    for state in states():
        torch.library.opcheck(torch.ops.pyargs.score_step.default, positional(scored(bias=True), state))


def test_compile():
    def step(state, **args):
        score_step(**args, activation="relu", state=state)
        return state.token + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for state in states():
        one, other = copied(state), copied(state)
        assert torch.equal(compiled(one, **scored(bias=True)), step(other, **scored(bias=True)))
        same_state(one, other, bitwise=True)


def test_schema_is_that_of_the_default():
    written = torch._C.parse_schema("pyargs::score_step" + torch.library.infer_schema(_default, mutates_args=WRITTEN))
    schema = torch.ops.pyargs.score_step.default._schema
    describe = lambda one: (one.name, str(one.type), one.has_default_value(), one.is_write)  # noqa: E731
    assert [describe(one) for one in schema.arguments] == [describe(one) for one in written.arguments]
    assert [one.name for one in schema.arguments if one.is_write] == list(WRITTEN)


def test_native_here():
    pytest.importorskip("pyargs._C")
    from pyargs import ops

    assert {"score_step", "tokenwise_step"} <= ops.native
