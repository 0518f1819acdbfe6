"""The thread of an engine: requests come from an event loop and go, others never notice, and no error ends it unsaid."""

from __future__ import annotations

import asyncio
import threading

import pytest
import serving
import torch

from pyargs.errors import PyargsError, UnknownUser
from pyargs.serve import worker as workers
from pyargs.serve.worker import Broken, Full, TooSlow

WISH = {"reward_weight": 1.0, "max_new_tokens": 8, "temperature": 1.0, "seed": 3}
PROMPTS = [[5, 6, 7], [9, 8], [11, 12, 13, 14], [20]]


@pytest.fixture(scope="module")
def folder(lm_folder):
    return lm_folder


async def tokens(call) -> dict[int, list[int]]:
    """What a call's requests choose, until all have ended. Raises what ended one otherwise."""
    found = {}
    while call.left or call._events:
        for which, event, _ in await call.events():
            if event.error is not None:
                raise event.error
            if event.token is not None and (event.answer is None or event.answer.finish_reason != "stop"):
                found.setdefault(which, []).append(event.token)
    return found


def alone(folder, prompt, user, **wish):
    engine = serving.engine(folder, max_rows=1)
    number = engine.submit(prompt, user, **(WISH | wish))
    while engine.busy:
        engine.step()
    return engine.answer(number)


def test_answers_in_company_are_the_answers_alone(folder):
    async def ask(worker, i):
        await asyncio.sleep(0.002 * i)
        call = await worker.ask([PROMPTS[i % 4], PROMPTS[(i + 1) % 4]], serving.USERS[i % 3], [WISH, WISH | {"seed": 9}])
        return await tokens(call)

    async def all_of_them(worker):
        return await asyncio.gather(*(ask(worker, i) for i in range(9)))

    with serving.worker(serving.engine(folder, max_rows=3)) as worker:
        found = asyncio.run(all_of_them(worker))
        assert worker.open == 0 and not worker.engine.busy
    for i, answers in enumerate(found):
        user = serving.USERS[i % 3]
        assert answers[0] == alone(folder, PROMPTS[i % 4], user).tokens
        assert answers[1] == alone(folder, PROMPTS[(i + 1) % 4], user, seed=9).tokens


def test_nobody_s_rows_stand_beside_the_guided_ones(folder):
    async def both(worker):
        calls = [
            await worker.ask([PROMPTS[0]], user, [WISH | more]) for user, more in (("ann", {}), ("", {"reward_weight": 0.0}))
        ]
        return [(await tokens(call))[0] for call in calls]

    with serving.worker(serving.engine(folder)) as worker:
        guided, free = asyncio.run(both(worker))
        assert "" in worker.engine.pair.model.known_users
    assert guided == alone(folder, PROMPTS[0], "ann").tokens
    assert free == alone(folder, PROMPTS[0], "bob", reward_weight=0.0).tokens


def test_a_full_queue_refuses_and_has_room_again(folder):
    async def fill(worker):
        calls = [await worker.ask([PROMPTS[0]] * 2, "ann", [WISH] * 2) for _ in range(2)]
        with pytest.raises(Full) as full:
            await worker.ask([PROMPTS[0]], "ann", [WISH])
        assert 1 <= full.value.seconds <= 60
        for call in calls:
            await tokens(call)
        await tokens(await worker.ask([PROMPTS[0]] * 4, "ann", [WISH] * 4))

    with serving.worker(serving.engine(folder, max_rows=1), max_waiting=3) as worker:
        asyncio.run(fill(worker))
        assert worker.open == 0


def test_one_who_floods_leaves_places_to_the_others(folder):
    async def flood(worker):
        gate, calls = threading.Event(), []
        worker.call(lambda engine: gate.wait())  # nothing ends meanwhile
        with pytest.raises(Full):
            while True:
                calls.append(asyncio.ensure_future(worker.ask([PROMPTS[0]], "ann", [WISH], of="one")))
                await asyncio.sleep(0)
                if calls[-1].done():
                    calls.pop().result()
        before = len(calls)
        calls.append(asyncio.ensure_future(worker.ask([PROMPTS[1]], "ann", [WISH], of="other")))
        gate.set()
        for task in calls:
            await tokens(await task)
        assert await tokens(await worker.ask([PROMPTS[0]] * 8, "ann", [WISH] * 8, of="one")), (
            "who has nothing open has all places"
        )
        return before

    with serving.worker(serving.engine(folder, max_rows=2), max_waiting=6) as worker:
        assert asyncio.run(flood(worker)) == 5, "both rows, and half of what waits"


def test_what_the_engine_refuses_leaves_nothing_behind(folder):
    async def refused(worker):
        good = await worker.ask([PROMPTS[0]], "ann", [WISH])
        with pytest.raises(UnknownUser):
            await worker.ask([PROMPTS[0]], "nobody", [WISH])
        with pytest.raises(PyargsError, match="whole number"):  # the first of the two is taken back
            await worker.ask([PROMPTS[0]] * 2, "ann", [WISH, WISH | {"num_candidates": 1000}])
        return (await tokens(good))[0]

    with serving.worker(serving.engine(folder, max_rows=1)) as worker:
        assert asyncio.run(refused(worker)) == alone(folder, PROMPTS[0], "ann").tokens
        asyncio.run(until(lambda: worker.open == 0))
        assert not worker.engine._tickets and not worker._asked


async def until(holds, seconds: float = 20) -> None:
    for _ in range(round(seconds / 0.01)):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never held")


def test_a_cancelled_call_ends_within_a_step(folder):
    steps = []

    async def leave(worker):
        long = [WISH | {"max_new_tokens": 1500, "stop": []}] * 2
        call = await worker.ask([PROMPTS[0]] * 2, "ann", long)
        await call.events()
        worker.cancel(call)
        await worker_is_idle(worker)
        await until(lambda: call.left == 0)
        return worker.open

    async def worker_is_idle(worker):
        before = len(steps)
        busy = await asyncio.wrap_future(worker.call(lambda engine: engine._scheduler.here))
        assert busy == [] and len(steps) - before <= 1

    with serving.worker(serving.engine(folder)) as worker:
        worker.on_step = steps.append
        assert asyncio.run(leave(worker)) == 0


def test_a_call_that_is_given_up_before_it_was_submitted_is_cancelled(folder):
    async def impatient(worker):
        gate = threading.Event()
        worker.call(lambda engine: gate.wait())  # as a long step
        task = asyncio.ensure_future(worker.ask([PROMPTS[0]], "ann", [WISH | {"max_new_tokens": 1500, "stop": []}]))
        await asyncio.sleep(0.01)
        task.cancel()
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: worker.open == 0)

    with serving.worker(serving.engine(folder)) as worker:
        asyncio.run(impatient(worker))
        assert not worker.engine._tickets


def test_calls_run_between_steps_on_the_thread(folder):
    with serving.worker(serving.engine(folder)) as worker:
        assert worker.call(lambda engine: threading.current_thread().name).result() == "pyargs-serve"
        assert worker.call(lambda engine: engine).result() is worker.engine
        with pytest.raises(ZeroDivisionError):
            worker.call(lambda engine: 1 / 0).result()
        assert worker.call(lambda engine: 2).result() == 2


def test_a_step_that_fails_ends_those_in_it_alone(folder, monkeypatch):
    engine = serving.engine(folder, max_rows=1)
    real, broken = engine._next, []

    def once():
        if not broken:
            broken.append(True)
            raise RuntimeError("out of something")
        return real()

    monkeypatch.setattr(engine, "_next", once)

    async def two(worker):
        first = await worker.ask([PROMPTS[0]], "ann", [WISH])
        second = await worker.ask([PROMPTS[1]], "bob", [WISH])
        with pytest.raises(PyargsError, match="a step failed"):
            await tokens(first)
        return (await tokens(second))[0]

    with serving.worker(engine) as worker:
        assert asyncio.run(two(worker)) == alone(folder, PROMPTS[1], "bob").tokens
        assert worker.error is None and worker.open == 0


def test_steps_that_fail_with_somebody_in_them_never_end_the_service(folder, monkeypatch):
    """Each of them ends its own, at once, and the next one has its answer."""
    engine = serving.engine(folder, max_rows=1)
    real, left = engine._next, [workers.FAILURES + 2]

    def often():
        if left[0]:
            left[0] -= 1
            raise RuntimeError("out of something")
        return real()

    monkeypatch.setattr(engine, "_next", often)

    async def many(worker):
        calls = [await worker.ask([PROMPTS[0]], "bob", [WISH]) for _ in range(left[0])]  # of one user: in this order
        last = await worker.ask([PROMPTS[1]], "bob", [WISH])
        for call in calls:
            with pytest.raises(PyargsError, match="a step failed"):
                await tokens(call)
        return (await tokens(last))[0]

    with serving.worker(engine) as worker:
        assert asyncio.run(many(worker)) == alone(folder, PROMPTS[1], "bob").tokens
        assert worker.error is None and worker.open == 0


def test_a_step_that_fails_tells_those_whom_it_ends_at_once(folder, monkeypatch):
    """Also where no later step goes well."""
    engine = serving.engine(folder, max_rows=1)
    monkeypatch.setattr(workers, "FAILURES", 10**9)

    def broken():
        with torch.no_grad():
            engine.pair.policy.lm_head.weight.mul_(1.1)  # the engine refuses to go on
        raise RuntimeError("out of something")

    monkeypatch.setattr(engine, "_next", broken)

    async def first(worker):
        call = await worker.ask([PROMPTS[0]], "ann", [WISH])
        waits = await worker.ask([PROMPTS[0]], "ann", [WISH])
        with pytest.raises(PyargsError, match="a step failed"):
            await asyncio.wait_for(tokens(call), 60)
        worker.cancel(waits)

    with serving.worker(engine) as worker:
        asyncio.run(first(worker))


def test_a_device_that_is_lost_ends_the_service_at_once(folder, monkeypatch):
    engine = serving.engine(folder, max_rows=1)

    def lost():
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(engine, "_next", lost)

    async def ask(worker):
        call, errors = await worker.ask(PROMPTS[:2], "ann", [WISH] * 2), {}
        while call.left:
            errors |= {which: event.error for which, event, _ in await call.events()}
        assert "a step failed" in str(errors[0]) and isinstance(errors[1], Broken)
        with pytest.raises(Broken):
            await worker.ask([PROMPTS[0]], "ann", [WISH])

    with serving.worker(engine) as worker:
        asyncio.run(ask(worker))


def test_an_engine_that_fails_at_every_step_is_said_to_all(folder):
    engine = serving.engine(folder, max_rows=1)

    async def ask(worker):
        with torch.no_grad():
            engine.pair.policy.lm_head.weight.mul_(1.1)  # the engine refuses to go on
        call = await worker.ask(PROMPTS[:2], "ann", [WISH] * 2)  # both come before the first step
        with pytest.raises(Broken, match="refresh"):
            await tokens(call)
        await until(lambda: worker.open == 0)
        with pytest.raises(Broken):
            await worker.ask([PROMPTS[0]], "ann", [WISH])

    with serving.worker(engine) as worker:
        asyncio.run(ask(worker))
        assert worker.call(lambda engine: 1).result() == 1 and worker.open == 0


def test_who_does_not_read_is_left_and_holds_up_nobody(folder, monkeypatch):
    monkeypatch.setattr(workers, "UNREAD", 5)

    async def slow(worker):
        lazy = await worker.ask([PROMPTS[0]], "ann", [WISH | {"max_new_tokens": 1500, "stop": []}])
        found = (await tokens(await worker.ask([PROMPTS[1]], "bob", [WISH | {"max_new_tokens": 4}])))[0]
        await until(lambda: worker.open == 0)
        assert len(lazy._events) <= 5
        with pytest.raises(TooSlow):
            await lazy.events()
        return found

    with serving.worker(serving.engine(folder)) as worker:
        assert asyncio.run(slow(worker)) == alone(folder, PROMPTS[1], "bob", max_new_tokens=4).tokens


def test_a_user_who_comes_serves_the_next_request(folder):
    async def ask(worker):
        users = worker.engine.pair.model.users
        own = {name: value[users.rows(["bob"])].detach().clone() for name, value in users.vectors.items()}
        worker.call(lambda engine: users.append(["twin"], **own))
        return [(await tokens(await worker.ask([PROMPTS[0]], user, [WISH])))[0] for user in ("bob", "twin")]

    with serving.worker(serving.engine(folder)) as worker:
        one, other = asyncio.run(ask(worker))
        assert one == other
