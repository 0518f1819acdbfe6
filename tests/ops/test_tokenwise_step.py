from __future__ import annotations

import emulated
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scored import decided_by_rounding, random_logits
from states import WRONG_STATES, copied, drawn_state, refused, same_state, state_of

from pyargs.ops import RowState, tokenwise_select, tokenwise_step, tokenwise_step_reference, topk_logprobs
from pyargs.ops.row_state import WRITTEN, choice_arguments
from pyargs.ops.tokenwise_step import _default

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(batch=3, vocab=50, k=4, seed=0, dtypes=(torch.float32, torch.float32)) -> dict:
    logits, rewards = (random_logits(batch, vocab, dtype, 2 * seed + i) for i, dtype in enumerate(dtypes))
    return {"logits": logits, "reward_logits": rewards, "k": k}


def after(op, args: dict, state: RowState) -> RowState:
    """The state after a step from this one."""
    state = copied(state)
    assert op(**args, state=state) is None
    return state


def clear(args: dict, state: RowState) -> torch.Tensor:
    """Rows [B] that no rounding decides."""
    choice = choice_arguments(state, topk_logprobs(args["logits"], args["k"])[0])
    given = {name: value for name, value in choice.items() if value is not None}
    return ~decided_by_rounding({**args, **given}) | state.finished


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_like_the_reference(data):
    drawn(data, tokenwise_step)


@emulated.needed
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_cuda_kernel_emulated(data):
    emulated.order(data.draw(st.integers(0, 99), "order of threads and blocks"))
    drawn(data, emulated.tokenwise_step)


def drawn(data, op) -> None:
    draw = data.draw
    vocab = draw(st.one_of(st.integers(1, 1100), st.sampled_from([8191, 8193, 16897])), "vocab")
    args = problem(
        batch=draw(st.integers(0, 4), "batch"),
        vocab=vocab,
        k=draw(st.integers(1, min(64, vocab)), "k"),
        seed=draw(st.integers(0, 99), "seed"),
        dtypes=(draw(st.sampled_from(DTYPES), "dtype"), draw(st.sampled_from(DTYPES), "dtype of the rewards")),
    )
    batch = len(args["logits"])
    if (
        batch
        and (special := draw(st.sampled_from([None, None, torch.nan, torch.inf, -torch.inf]), "special value")) is not None
    ):
        args[draw(st.sampled_from(["logits", "reward_logits"]), "of")][0, vocab // 2] = special
    state = drawn_state(data, batch, args["k"], sums=False)
    same_state(after(op, args, state), after(tokenwise_step_reference, args, state), clear(args, state))


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_it_chooses_what_tokenwise_select_does(data):
    args = problem(batch=4, k=data.draw(st.integers(1, 12)), seed=data.draw(st.integers(0, 99)))
    state = drawn_state(data, 4, args["k"], sums=False)
    choice = choice_arguments(state, topk_logprobs(args["logits"], args["k"])[0])
    token, slot, reward, finished = tokenwise_select(**args, **choice)
    got, on = after(tokenwise_step, args, state), ~state.finished
    assert torch.equal(got.token, token) and torch.equal(got.slot, slot.masked_fill(got.finished, -1))
    own = reward.gather(1, slot.clamp(min=0).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(got.chosen[:, 2].float(), own, atol=0, rtol=0, equal_nan=True)
    assert torch.equal(got.finished, finished | (on & (got.step >= state.limit)))


@pytest.mark.parametrize("op", [tokenwise_step, pytest.param(emulated.tokenwise_step, marks=emulated.needed)])
def test_steps_in_a_row_are_bitwise_those_of_each_row_alone(op):
    g = torch.Generator().manual_seed(0)
    state = state_of(
        3, temperature=torch.ones(3), noise=torch.rand(3, 4, generator=g), own_k=torch.tensor([10, 3, 7]),
        top_p=torch.full((3,), 0.8).double(), min_p=torch.full((3,), 0.01).double(), limit=torch.tensor([2, 9, 4]),
    )  # fmt: skip
    cut = lambda row: RowState(*(None if part is None else part[row : row + 1].clone() for part in state))  # noqa: E731
    together, alone = copied(state), [cut(row) for row in range(3)]
    for seed in range(3):
        args = problem(vocab=9001, k=10, seed=seed)
        op(**args, state=together)
        for row, own in enumerate(alone):
            op(**args | {name: args[name][row : row + 1] for name in ("logits", "reward_logits")}, state=own)
    for row, own in enumerate(alone):
        same_state(own, RowState(*(None if part is None else part[row : row + 1] for part in together)), bitwise=True)


def test_every_capability(capability):
    for k in (1, 10, 64):
        args, state = problem(vocab=9001, k=k), state_of()
        same_state(after(tokenwise_step, args, state), after(tokenwise_step_reference, args, state), clear(args, state))


@pytest.mark.parametrize("function", [tokenwise_step, tokenwise_step_reference])
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        *WRONG_STATES,
        ({"so_far": torch.zeros(3)}, ValueError, "leave out so_far and total"),
        ({"total": torch.zeros(3)}, ValueError, "leave out so_far and total"),
    ],
)
def test_errors_name_the_fix(function, change, error, says):
    refused(function, torch.ops.pyargs.tokenwise_step, tuple(problem().values()), state_of(), change, error, says)


def states() -> list[RowState]:
    own = dict(own_k=torch.tensor([1, 4, 2]), top_p=torch.full((3,), 0.9).double(), min_p=torch.zeros(3).double())
    heat = dict(temperature=torch.tensor([0.0, 0.5, 2.0]), noise=torch.full((3, 2), 0.4))
    return [state_of(), state_of(**own, **heat)]


def test_opcheck():
    for state in states():
        torch.library.opcheck(torch.ops.pyargs.tokenwise_step.default, (*problem().values(), *state, 0))


def test_compile():
    def step(state, **args):
        tokenwise_step(**args, state=state)
        return state.token + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for state in states():
        one, other = copied(state), copied(state)
        assert torch.equal(compiled(one, **problem()), step(other, **problem()))
        same_state(one, other, bitwise=True)


def test_schema_is_that_of_the_default():
    written = torch._C.parse_schema("pyargs::tokenwise_step" + torch.library.infer_schema(_default, mutates_args=WRITTEN))
    describe = lambda one: (one.name, str(one.type), one.has_default_value(), one.is_write)  # noqa: E731
    schema = torch.ops.pyargs.tokenwise_step.default._schema
    assert [describe(one) for one in schema.arguments] == [describe(one) for one in written.arguments]
    assert [one.name for one in schema.arguments if one.is_write] == list(WRITTEN)
