"""What becomes of a request: an event at each step, and an answer at the end."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from pyargs.decode.request import Request
from pyargs.errors import PyargsError


@dataclass
class Answer:
    """One row's result.

    number: of the request, as `Engine.submit` gave it. tokens: ids without the stop token; text: the same decoded, None
    without a tokenizer. rewards: of each token, raw; slots: its rank among the policy's candidates (0 is its favourite);
    spreads: standard deviation of the rewards over the candidates. finish_reason: "stop" (a stop token came), "length" or
    "cancelled". backend: what computed it. seed: of its sampling.
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
    """What a step did for one request: the token that it chose, its reward and its slot; the answer with the last one.

    A request that was cancelled has an answer and no token, one in which nothing could be chosen an error. The last event of
    best-of-N says that `Engine.answer` has the answer.
    """

    number: int
    token: int | None
    reward: float
    slot: int
    answer: Answer | None
    error: Exception | None


@dataclass
class Ticket:
    """A request on its way."""

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
