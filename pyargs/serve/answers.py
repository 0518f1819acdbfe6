"""The answers of a call as they come, and the bodies that tell them: one at the end, or a stream of chunks."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence

from pyargs.decode.answer import Event
from pyargs.errors import UnknownUser
from pyargs.serve.logprobs import Said
from pyargs.serve.metrics import Metrics
from pyargs.serve.text import Writer
from pyargs.serve.wire import DONE, Form, WireError, event, unknown_user, usage
from pyargs.serve.worker import Call, TooSlow, Worker

log = logging.getLogger("pyargs")


class Choice:
    """One answer as it comes: `take` its events, and tell what is new.

    guided: whether rewards are told. logprobs: makes what is told of tokens from a list of `logprobs.Said`.
    reason: "stop" or "length" once it is complete, "cancelled" where somebody has ended it. count: its tokens, without the
    stop token.
    """

    def __init__(self, index: int, writer: Writer, *, guided: bool, logprobs: Callable[[list[Said]], dict] | None = None):
        self.index, self.reason, self.count, self.when = index, None, 0, None
        self._writer, self._guided, self._logprobs = writer, guided, logprobs
        self._text: list[str] = []
        self._rewards: list[float] = []
        self._slots: list[int] = []
        self._said: list[Said] = []

    def take(self, event: Event) -> None:
        answer = event.answer
        if event.token is not None and (answer is None or answer.finish_reason != "stop"):
            self.count += 1
            self._rewards.append(event.reward)
            self._slots.append(event.slot)
            if self._logprobs is not None:
                self._said.append(Said(event.token, event.told, self._writer.length))
            self._text.append(self._writer.add(event.token))
        if answer is not None:
            self._text.append(self._writer.rest())
            self.reason = answer.finish_reason
        if self._writer.stopped:
            self.reason = "stop"

    @property
    def told(self) -> bool:
        """Whether all text that has come has been told."""
        return not any(self._text)

    def news(self) -> tuple[str, dict | None, dict]:
        """Text since the last time, and log-probs, rewards and slots of all tokens since then."""
        text, ours = "".join(self._text), {"rewards": None, "slots": None}
        if self._guided:
            ours = {"rewards": self._rewards, "slots": self._slots}
        logprobs = self._logprobs(self._said) if self._said else None
        self._text, self._rewards, self._slots, self._said = [], [], [], []
        return text, logprobs, ours


class Answers:
    """The answers of one call.

    noted: for the request's line in the log. arrived: `time.perf_counter` of the request.
    """

    def __init__(self, worker: Worker, call: Call, choices: Sequence[Choice], metrics: Metrics, noted: dict, arrived: float):
        self.choices, self._worker, self._call = choices, worker, call
        self._metrics, self._noted, self._arrived = metrics, noted, arrived

    @property
    def complete(self) -> bool:
        return all(choice.reason is not None for choice in self.choices)

    async def come(self) -> list[Choice]:
        """Waits for a step. Returns the choices that it went on with. Raises WireError where one of them has failed."""
        moved = {}
        for which, told, when in await self._events():
            choice = self.choices[which]
            if choice.reason is not None:  # a stop string came, and the engine was a step ahead
                continue
            if told.error is not None:
                raise self._failed(told.error)
            choice.take(told)
            self._time(choice, when)
            if choice.reason is not None and told.answer is None:
                self._worker.cancel(self._call, which)
            if choice.reason == "cancelled":
                self._noted["outcome"] = "failed"
                raise WireError(503, "the service has ended this answer: ask again", code="cancelled")
            moved[which] = choice
        return list(moved.values())

    def leave(self) -> None:
        """Behind the last chunk, or where the client has gone: ends what has not ended."""
        self._worker.cancel(self._call)
        tokens = sum(choice.count for choice in self.choices)
        self._metrics.tokens.labels("completion").inc(tokens)
        self._noted["completion_tokens"] = tokens
        if not self.complete:
            self._noted.setdefault("outcome", "gone")

    async def _events(self) -> list[tuple[int, Event, float]]:
        try:
            return await self._call.events()
        except TooSlow as error:
            raise self._failed(error) from error

    def _time(self, choice: Choice, when: float) -> None:
        if "first_token" not in self._noted:
            self._noted["first_token"] = round(when - self._arrived, 4)
            self._metrics.first.observe(when - self._arrived)
        if choice.when is not None:
            self._metrics.between.observe(when - choice.when)
        choice.when = when

    def _failed(self, error: Exception) -> WireError:
        """The error of an answer that ended in the middle. What happened in the engine stands in the log alone."""
        self._noted["outcome"] = "failed"
        if isinstance(error, UnknownUser):  # removed while the request waited
            return unknown_user()
        log.error("an answer failed: %s", error)
        return WireError(500, "the answer failed: a smaller weight may help, or the service's log", code="failed")


async def whole(answers: Answers, form: Form, prompt_tokens: int, ours: dict) -> dict:
    """The body of an answer that is not streamed. ours: what all choices say of how they were made."""
    while not answers.complete:
        await answers.come()
    choices = []
    for choice in answers.choices:
        text, logprobs, new = choice.news()
        choices.append(form.choice(choice.index, text, choice.reason, logprobs, {**new, **ours}))
    return form.whole(choices, usage(prompt_tokens, sum(choice.count for choice in answers.choices)))


async def chunks(answers: Answers, form: Form, prompt_tokens: int, ours: dict, *, with_usage: bool) -> AsyncIterator[bytes]:
    """The events of a stream: chunks of text, one for the end of each choice, one for usage."""
    if form.chat:
        for choice in answers.choices:
            yield form.chunk([form.delta(choice.index, "", None, None, None, first=True)])
    try:
        while not answers.complete:
            for choice in await answers.come():
                if not choice.told:
                    text, logprobs, new = choice.news()
                    yield form.chunk([form.delta(choice.index, text, None, logprobs, new)])
                if choice.reason is not None:
                    _, logprobs, new = choice.news()
                    yield form.chunk([form.delta(choice.index, None, choice.reason, logprobs, {**new, **ours})])
    except WireError as error:
        yield event(error.body())
        return
    if with_usage:
        yield form.chunk([], usage(prompt_tokens, sum(choice.count for choice in answers.choices)))
    yield DONE
