"""What a request gets: an event at each step, and an answer at the end."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from pyargs.decode.request import Request, no_choice
from pyargs.errors import PyargsError


@dataclass
class Answer:
    """The answer to one request.

    number: the request's, as `Engine.submit` returned it. tokens: ids without the stop token; text: the same decoded, None
    without a tokenizer. rewards: each token's raw reward; slots: each token's rank among the policy's candidates, from 0;
    spreads: standard deviation of the candidates' rewards at each token. finish_reason: "stop" (a stop token came), "length"
    or "cancelled". backend: the name of the backend that computed it. seed: of its sampling.
    """

    number: int
    user: str
    prompt: list[int]
    tokens: list[int]
    text: str | None
    rewards: list[float]
    slots: list[int]
    spreads: list[float]
    finish_reason: str
    reward_weight: float
    backend: str
    seed: int


class Event(NamedTuple):
    """One token of a request: its id, reward and slot; the last one has the answer, too.

    A cancelled request ends with an event that has an answer and no token. One in which nothing could be chosen ends with an
    error. With best-of-N there is one event, which has the answer and no token.
    """

    number: int
    token: int | None
    reward: float
    slot: int
    answer: Answer | None
    error: Exception | None


@dataclass
class Ticket:
    """A request that waits or is being answered, with what it has so far."""

    number: int
    request: Request
    tokens: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    spreads: list[float] = field(default_factory=list)
    answer: Answer | None = None
    error: PyargsError | None = None
    events: deque[Event] | None = None  # for whoever streams it
    left: bool = False  # nobody listens any more

    def note(
        self, position: int, token: int, slot: int, reward: float, spread: float, finished: bool, tokenizer, backend: str
    ) -> Event:
        """One step, in which the request stood at this position."""
        if slot < 0:
            self.error = no_choice(f"row(s) [{position}], request {self.number}")
            return Event(self.number, None, reward, slot, None, self.error)
        stopped = token in self.request.stop
        if not stopped:
            self.tokens.append(token)
            self.rewards.append(reward)
            self.slots.append(slot)
            self.spreads.append(spread)
        if finished:
            self.finish("stop" if stopped else "length", tokenizer, backend)
        return Event(self.number, token, reward, slot, self.answer, None)

    def finish(self, reason: str, tokenizer, backend: str) -> None:
        """Makes the answer of what there is so far."""
        request = self.request
        text = None if tokenizer is None else tokenizer.decode(self.tokens, skip_special_tokens=True).strip()
        self.answer = Answer(
            self.number, request.user, list(request.prompt), self.tokens, text, self.rewards, self.slots, self.spreads, reason,
            request.reward_weight, backend, request.seed,
        )  # fmt: skip
