"""Prompts that are read in parts, so that a long one does not hold up the others."""

from __future__ import annotations

import pytest
import torch
from company import check_company, wishes
from conftest import tiny_lm
from decoding import USERS, pair_in_float32, prompts, shared_pair
from hypothesis import given, settings
from hypothesis import strategies as st

from pyargs.decode.backends import eager
from pyargs.decode.engine import Engine
from pyargs.decode.scheduler import Scheduler
from pyargs.errors import PyargsError, UnknownUser
from pyargs.lm.stack.run import Stack
from pyargs.models.token_reward import TokenReward


@settings(max_examples=15, deadline=None)
@given(wishes(), st.sampled_from(["own", "shared", "shared lora"]), st.integers(1, 4), st.integers(1, 5))
def test_on_the_cpu_stack_an_answer_is_that_of_the_prompt_read_whole_bit_for_bit(requests, weights, room, part):
    policy, model = pair_in_float32(weights)
    make = lambda room: Engine(policy, model, max_rows=room, backend="cpu", prefill_tokens=part)  # noqa: E731
    check_company(make, requests, room, exact=True, alone=lambda room: Engine(policy, model, max_rows=room, backend="cpu"))


@settings(max_examples=15, deadline=None)
@given(wishes(4), st.sampled_from(["own", "shared", "shared lora"]), st.integers(1, 3), st.integers(1, 5))
def test_elsewhere_too(requests, weights, room, part):
    policy, model = shared_pair(weights, "mlp", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(eager.MOST_ROWS, "cpu", 1000)  # both halves in one pass
        make = lambda room: Engine(policy, model, max_rows=room, backend="eager", prefill_tokens=part)  # noqa: E731
        check_company(make, requests, room, alone=lambda room: Engine(policy, model, max_rows=room, backend="eager"))


@settings(max_examples=10, deadline=None)
@given(wishes(4, clip=False), st.integers(1, 3), st.integers(1, 5), st.sampled_from(["cpu", "eager"]), st.booleans())
def test_with_a_token_reward_and_alone(requests, room, part, backend, guided):
    dtype = torch.float32 if backend == "cpu" else torch.float64
    policy = tiny_lm(dtype=dtype)
    model = TokenReward(tiny_lm(seed=3, dtype=dtype), None) if guided else None
    if not guided:
        for _, _, more, *_ in requests:
            del more["reward_weight"], more["num_candidates"]
    make = lambda room: Engine(policy, model, max_rows=room, backend=backend, prefill_tokens=part)  # noqa: E731
    whole = lambda room: Engine(policy, model, max_rows=room, backend=backend)  # noqa: E731
    check_company(make, requests, room, exact=backend == "cpu", alone=whole)


def tokens_of_steps(engine, monkeypatch) -> list[int]:
    """Of each step that the engine computes from now on, how many tokens of prompts its stacks read."""
    read, inner = [], Stack.__call__

    def watched(self, ids, cache, mask=None, *, branches=False, **more):
        if not branches and ids.shape[1] > 1:
            read[-1] += int(ids.numel() if mask is None else mask.sum())
        return inner(self, ids, cache, mask, branches=branches, **more)

    monkeypatch.setattr(Stack, "__call__", watched)
    compute = engine._compute
    monkeypatch.setattr(engine, "_compute", lambda: (read.append(0), compute()))
    return read


def test_a_step_reads_no_more_than_the_bound_and_the_others_go_on(monkeypatch):
    policy, model = pair_in_float32("shared")
    engine = Engine(policy, model, max_rows=4, prefill_tokens=8)
    read = tokens_of_steps(engine, monkeypatch)
    wish = dict(reward_weight=1.0, max_new_tokens=30, stop=[])
    short, second, long, third = (engine.submit(row, "ann", **wish) for row in prompts([3, 6, 45, 4]))
    first = {}
    for step in range(40):
        for event in engine.step():
            first.setdefault(event.number, step)
    assert max(read) <= 8 and sum(read) == 3 + 6 + 45 + 4
    assert first == {short: 0, second: 1, long: 7, third: 8 if 45 % 8 + 4 > 8 else 7}  # 6 parts from step 2 on
    assert len(engine.answer(short).tokens) == 30  # a token at each step, also while the long prompt was read


def test_a_text_that_is_known_is_not_read_again(monkeypatch):
    policy, model = pair_in_float32("shared")
    engine = Engine(policy, model, max_rows=2, prefill_tokens=4)
    read, (prompt,) = tokens_of_steps(engine, monkeypatch), prompts([32])
    wish = dict(users=["ann"], reward_weight=1.0, max_new_tokens=3, stop=[])
    want = engine.generate([prompt], **wish)[0].tokens
    before = sum(read)
    assert engine.generate([prompt], **wish)[0].tokens == want and sum(read) <= before + 1


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_what_happens_to_a_request_whose_prompt_is_being_read(backend, monkeypatch):
    policy, model = pair_in_float32("own")
    make = lambda: Engine(policy, model, max_rows=3, backend=backend, prefill_tokens=4)  # noqa: E731
    (short, long), wish = prompts([3, 19]), dict(reward_weight=2.0, max_new_tokens=12, stop=[])
    want = {user: make().generate([short], [user], **wish)[0].tokens for user in USERS}

    def begun():
        engine = make()
        other = engine.submit(short, "ann", **wish)
        engine.step()
        number = engine.submit(long, "bob", **wish)
        engine.step(), engine.step()
        assert engine.busy and engine._scheduler.reading == number and engine.answer(number) is None
        return engine, other, number

    def others_go_on(engine, other):
        again = engine.submit(short, "cid", **wish)
        after = engine.submit(long, "cid", **wish)
        while engine.busy:
            engine.step()
        assert engine.answer(other).tokens == want["ann"] and engine.answer(again).tokens == want["cid"]
        assert engine.answer(after).tokens == make().generate([long], ["cid"], **wish)[0].tokens

    engine, other, number = begun()
    engine.cancel(number)
    assert engine.answer(number).finish_reason == "cancelled"
    others_go_on(engine, other)

    engine, other, number = begun()
    bob = model.users.vectors["mixture"].detach()[model.users.ids["bob"]][None].clone()
    model.users.remove(["bob"])
    try:
        others_go_on(engine, other)
        with pytest.raises(UnknownUser, match="bob"):
            engine.answer(number)
    finally:
        model.users.append(["bob"], mixture=bob)

    engine, other, number = begun()
    engine.refresh()
    assert engine.answer(number).finish_reason == engine.answer(other).finish_reason == "cancelled"
    assert len(engine.step()) == 2 and not engine.busy
    assert engine.generate([short], ["cid"], **wish)[0].tokens == want["cid"]

    engine, other, number = begun()
    with monkeypatch.context() as patch:
        patch.setattr(engine._rows, "read", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    for lost in (other, number):
        with pytest.raises(PyargsError, match="a step failed"):
            engine.answer(lost)
    assert engine.generate([short], ["cid"], **wish)[0].tokens == want["cid"]


def test_the_scheduler_lets_in_what_may_be_read():
    sizes = {0: 3, 1: 2, 2: 9, 3: 1, 4: 4}
    scheduler = Scheduler(4)
    for number in sizes:
        scheduler.add(number, "one")
    admit = lambda: scheduler.admit(size=sizes.__getitem__, most=4)  # noqa: E731
    assert admit() == [0] and admit() == [1]
    for end in (4, 8):
        assert admit() == [] and (scheduler.reading, scheduler.end) == (2, end)
        scheduler.read = end
    assert admit() == [2, 3] and scheduler.reading is None and scheduler.here == [0, 1, 2, 3]
    assert scheduler.next is None and scheduler.leave([1]) == [0, 3, 2] and admit() == [4]


def test_the_bound_is_a_number_of_tokens():
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(PyargsError, match="prefill_tokens"):
            Engine(tiny_lm(), prefill_tokens=wrong)
