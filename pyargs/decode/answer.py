"""What a request gets: an event at each step, and an answer at the end."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from pyargs.decode.request import Request, no_choice
from pyargs.errors import PyargsError


class Candidate(NamedTuple):
    """A token that the policy could have chosen: its id, log-probability, and reward, None where it has none: in a row that no
    reward guides, and behind the row's own candidates."""

    token: int
    logprob: float
    reward: float | None


class Told(NamedTuple):
    """Of a token that was chosen the policy's log-probability, and the likeliest candidates beside it."""

    logprob: float
    candidates: list[Candidate]


@dataclass
class Answer:
    """The answer to one request.

    number: the request's, as `Engine.submit` returned it. tokens: ids without the stop token; text: the same decoded, None
    without a tokenizer. rewards: each token's reward, raw, or as `reward_clip` leaves it; slots: each token's rank among the
    policy's candidates, from 0; spreads: standard deviation of the candidates' rewards at each token. finish_reason: "stop" (a
    stop token came), "length" or "cancelled". backend: the name of the backend that computed it. seed: of its sampling. told:
    of each token what the request's `logprobs` asked for, None without.
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
    told: list[Told] | None = None


class Event(NamedTuple):
    """One token of a request: its id, reward and slot; the last one has the answer, too.

    A cancelled request ends with an event that has an answer and no token. One in which nothing could be chosen ends with an
    error. With best-of-N there is one event, which has the answer and no token. told: where the request has `logprobs`.
    """

    number: int
    token: int | None
    reward: float
    slot: int
    answer: Answer | None
    error: Exception | None
    told: Told | None = None


@dataclass
class Ticket:
    """A request that waits or is being answered, with what it has so far."""

    number: int
    request: Request
    tokens: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    spreads: list[float] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    answer: Answer | None = None
    error: PyargsError | None = None
    events: deque[Event] | None = None  # for whoever streams it
    left: bool = False  # nobody listens any more

    def note(
        self,
        position: int,
        token: int,
        slot: int,
        reward: float,
        spread: float,
        finished: bool,
        told: list | None,
        *,
        tokenizer,
        backend: str,
    ) -> Event:
        """One step, in which the request stood at this position. told: the row of `Choice.told`."""
        if slot < 0:
            self.error = no_choice(f"row(s) [{position}], request {self.number}")
            return Event(self.number, None, reward, slot, None, self.error)
        stopped, of_it = token in self.request.stop, None if not self.request.logprobs else self._told(told)
        if not stopped:
            self.told.append(of_it)
            self.tokens.append(token)
            self.rewards.append(reward)
            self.slots.append(slot)
            self.spreads.append(spread)
        if finished:
            self.finish("stop" if stopped else "length", tokenizer, backend)
        return Event(self.number, token, reward, slot, self.answer, None, of_it)

    def _told(self, rows: list) -> Told:
        (_, logprob, _), *others = rows[: 1 + self.request.logprobs]
        return Told(logprob, [Candidate(int(one), of, None if math.isnan(reward) else reward) for one, of, reward in others])

    def finish(self, reason: str, tokenizer, backend: str) -> None:
        """Makes the answer of what there is so far."""
        request = self.request
        text = None if tokenizer is None else tokenizer.decode(self.tokens, skip_special_tokens=True).strip()
        self.answer = Answer(
            self.number, request.user, list(request.prompt), self.tokens, text, self.rewards, self.slots, self.spreads, reason,
            request.reward_weight, backend, request.seed, self.told if request.logprobs else None,
        )  # fmt: skip
