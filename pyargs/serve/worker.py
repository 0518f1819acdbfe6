"""One thread owns the engine and steps it; asyncio hands it requests and gets their events."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from contextlib import suppress

import torch

from pyargs.decode.answer import Event
from pyargs.decode.engine import Engine
from pyargs.errors import PyargsError

log = logging.getLogger("pyargs")

UNREAD = 4096
"""Events of one call that wait for its client; at more the call ends, so that a client that does not read holds no more."""
FAILURES = 3
"""So many steps in a row that fail and end no request are the end of the service: none of them is why."""


class Full(PyargsError):
    """No room for another request. seconds: after which one may be tried again."""

    def __init__(self, waiting: int, seconds: int):
        super().__init__(f"{waiting} requests wait already: try again in {seconds} s")
        self.seconds = seconds


class Broken(PyargsError):
    """The engine fails at every step."""


class TooSlow(PyargsError):
    """A client has not read its answer for long."""


class Call:
    """Requests that are asked for at once, numbered from 0, and their events. Belongs to the event loop in which it was made.

    left: how many have not ended.
    """

    def __init__(self, count: int):
        self.left, self.slow = count, False
        self.numbers: list[int] = []  # the engine's; the worker's thread writes them
        self.loop, self._wake = asyncio.get_running_loop(), asyncio.Event()
        self._events: deque[tuple[int, Event, float]] = deque()

    async def events(self) -> list[tuple[int, Event, float]]:
        """What has come since the last time, one at least: (which request, its event, `time.perf_counter` of its step)."""
        if self.slow:
            raise TooSlow(f"{UNREAD} tokens were not read")
        await self._wake.wait()
        self._wake.clear()
        found = list(self._events)
        self._events.clear()
        return found

    def put(self, which: int, event: Event, when: float) -> None:
        self._events.append((which, event, when))
        self._wake.set()


class Worker:
    """The thread of an engine.

    engine: nobody else may use it from now on. max_waiting: requests that may wait for a row. For a model
    with vectors of users it adds the user "", whose vectors are zeros: rows of the policy alone, with reward_weight 0, go by
    that name beside the guided ones.
    """

    def __init__(self, engine: Engine, *, max_waiting: int = 64):
        self.engine, self.most = engine, engine.max_rows + max_waiting
        self.on_step: Callable[[float], None] = lambda seconds: None  # is called in the thread behind each step
        self._asked_for = self._ended = 0  # requests; the event loop counts the first, the thread the second
        self._calls_of: dict[Hashable, list[Call]] = {}  # that have not ended, by who has asked; the event loop's
        self.error: Exception | None = None  # why every step fails
        self._seconds = 1.0  # that an answer takes, roughly
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        self._asked: dict[int, tuple[Call, int, float]] = {}  # by the engine's number; only the thread reads it
        if engine.pair.guided:
            if engine.pair.model.about.get("reward_std") is not None:
                engine.raw_weight(1.0)  # measures it where it is not known for this policy
            add_nobody(engine.pair.model.users)
        self._thread = threading.Thread(target=self._run, name="pyargs-serve", daemon=True)
        self._thread.start()

    @property
    def open(self) -> int:
        """Requests that have not ended."""
        return self._asked_for - self._ended

    @property
    def waiting(self) -> int:
        """Requests beyond the rows of the engine."""
        return max(0, self.open - self.engine.max_rows)

    # -- from the event loop -------------------------------------------------------------------------------------------

    def call(self, function: Callable[[Engine], object]) -> Future:
        """Runs function(engine) in the thread between two steps; its result or error is the future's. Any thread may call."""
        future: Future = Future()
        self._calls.put((function, future))
        return future

    async def ask(self, prompts: Sequence[Sequence[int]], user: str, wishes: Sequence[dict], *, of: Hashable = None) -> Call:
        """Submits one request for each prompt (ids), with its arguments of `Engine.submit`; they wait or run from now on.

        of: who asks, of several; each may have as many requests waiting as places are free, so that nobody takes all. Raises
        Full where not all of them have room, Broken, and what `submit` refuses; then none of them is computed.
        """
        if self.error is not None:
            raise Broken(f"the engine fails at every step: {self.error}")
        room, count = self.most - self.open, len(prompts)
        theirs = self._calls_of[of] = [call for call in self._calls_of.get(of, ()) if call.left]
        share = room if of is None else self.engine.max_rows + room - sum(call.left for call in theirs)
        if count > min(room, share):
            raise Full(self.waiting, self.retry_after())
        theirs.append(call := Call(count))
        self._asked_for += call.left
        future = self.call(lambda engine: self._submit(call, prompts, user, wishes))
        try:
            await asyncio.shield(asyncio.wrap_future(future))  # it is submitted in any case, and cancelled behind that
        except BaseException:
            self._calls_of[of] = [one for one in self._calls_of[of] if one is not call]
            self.cancel(call)
            raise
        return call

    def cancel(self, call: Call, which: int | None = None) -> None:
        """Ends what has not ended of a call, or one request of it, between this step and the next."""
        if call.left:
            self.call(lambda engine: self._cancel(engine, call, which))

    def retry_after(self) -> int:
        """Seconds after which a row is likely to be free for one more request: 1 to 60."""
        return round(min(60.0, max(1.0, self._seconds * (1 + self.waiting) / self.engine.max_rows)))

    def stop(self) -> None:
        """Ends the thread behind its step. Requests that have not ended get no more events."""
        self._calls.put(None)
        self._thread.join()

    def _deliver(self, events: list[tuple[Call, int, Event]], when: float) -> None:
        """In the event loop: the events of one step."""
        for call, which, event in events:
            if event.answer is not None or event.error is not None:
                call.left -= 1
            if len(call._events) < UNREAD:
                call.put(which, event, when)
            elif not call.slow:
                call.slow = True
                self.cancel(call)

    # -- in the thread -------------------------------------------------------------------------------------------------

    def _submit(self, call: Call, prompts, user: str, wishes) -> None:
        now = time.perf_counter()
        try:
            if self.error is not None:  # since `ask` has looked
                raise Broken(f"the engine fails at every step: {self.error}")
            for which, (prompt, wish) in enumerate(zip(prompts, wishes, strict=True)):
                number = self.engine.submit(prompt, user, **wish)
                call.numbers.append(number)
                self._asked[number] = (call, which, now)
        except BaseException:
            self._ended += len(prompts) - len(call.numbers)
            raise

    def _cancel(self, engine: Engine, call: Call, which: int | None) -> None:
        for number in call.numbers if which is None else [call.numbers[which]]:
            if number in self._asked:
                engine.cancel(number)

    def _run(self) -> None:
        failures = 0
        while self._between_steps():
            started = time.perf_counter()
            try:
                events, failures = self.engine.step(), 0
            except Exception as error:
                log.exception("a step failed")
                # Those that were in it have ended with it, and may have been why. Where none ends, the next step is the same.
                events = self.engine.events()
                failures = 0 if any(event.error is not None for event in events) else failures + 1
                if failures == FAILURES or isinstance(error, torch.AcceleratorError):  # whose device computes nothing any more
                    events += self._give_up(error)
            when = time.perf_counter()
            self.on_step(when - started)
            self._tell(events, when)

    def _between_steps(self) -> bool:
        """Runs what was asked for; waits where there is nothing to compute. Returns whether the thread goes on."""
        while True:
            try:
                asked = self._calls.get(block=not self._busy())
            except queue.Empty:
                return True
            if asked is None:
                return False
            function, future = asked
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(self.engine))
            except BaseException as error:
                future.set_exception(error)

    def _busy(self) -> bool:
        return self.error is None and self.engine.busy

    def _tell(self, events: list[Event], when: float) -> None:
        """Hands the events of a step to the event loops of their calls, each in one piece."""
        loops: dict[asyncio.AbstractEventLoop, list] = {}
        for event in events:
            if event.number not in self._asked:  # of a request that a `call` made
                continue
            call, which, asked = self._asked[event.number]
            if event.answer is not None or event.error is not None:
                del self._asked[event.number]
                self._ended += 1
                self._forget(event.number)
                self._seconds += 0.1 * (when - asked - self._seconds)
            loops.setdefault(call.loop, []).append((call, which, event))
        for loop, some in loops.items():
            with suppress(RuntimeError):  # the loop has been closed: nobody listens
                loop.call_soon_threadsafe(self._deliver, some, when)

    def _forget(self, number: int) -> None:
        """Takes the answer from the engine, which keeps it otherwise."""
        with suppress(PyargsError):  # the event has it
            self.engine.answer(number)

    def _give_up(self, error: Exception) -> list[Event]:
        """Ends all requests with an error."""
        self.error = error
        broken = Broken(f"the engine fails at every step: {error}")
        return [Event(number, None, 0.0, 0, None, broken) for number in self._asked]


def add_nobody(users) -> None:
    """Adds the user "" with vectors of zeros to a table of `pyargs.types.Users` that has vectors."""
    if users.personal and "" not in users.ids:
        users.append([""], **{name: torch.zeros(1, *value.shape[1:]) for name, value in users.vectors.items()})
