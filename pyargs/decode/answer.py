"""The tokens of a batch's answers, collected step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyargs.decode.request import BatchRequest, check_numbers
from pyargs.types import Decoded


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


CHUNK = 4
"""Steps between two looks at a GPU's flags. What is asked for after one chunk is read after the next, when it has long
arrived: the host never waits, a stop is seen and an error raised within 8 steps, and late steps write only padding."""


class Output:
    """Collects what each step chose, on the device. Rows that have finished only add padding."""

    def __init__(self, rows: int, steps: int, device):
        self.tokens = torch.zeros(rows, steps, dtype=torch.long, device=device)
        self.slots = torch.zeros_like(self.tokens)
        self.rewards = torch.zeros(rows, steps, device=device, dtype=torch.float32)
        self.spreads = torch.zeros_like(self.rewards)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.bad = torch.zeros(rows, dtype=torch.bool, device=device)
        self.steps = torch.zeros(1, dtype=torch.long, device=device)
        self.late = torch.device(device).type != "cpu"
        self._asked: Callable[[], Tensor] | None = None

    def restart(self) -> None:
        """Empty again, in the same memory: `add` writes each place anew."""
        for counted in (self.lengths, self.bad, self.steps):
            counted.zero_()
        self._asked = None

    def add(self, token: Tensor, slot: Tensor, reward: Tensor, finished: Tensor) -> Tensor:
        """One step: the choice [B], the candidates' rewards [B, k], and which rows are finished after it.

        Returns the chosen candidates' rewards [B].
        """
        chosen = reward.gather(1, slot.clamp(min=0).unsqueeze(1)).squeeze(1)
        total = lambda x: x.cumsum(1)[:, -1:]  # noqa: E731  (one after the other: torch's own sums depend on the batch)
        mean = total(reward) / reward.shape[1]
        spread = (total((reward - mean).square()) / reward.shape[1]).sqrt().squeeze(1)
        for kept, new in ((self.tokens, token), (self.slots, slot), (self.rewards, chosen), (self.spreads, spread)):
            kept.index_copy_(1, self.steps, new.unsqueeze(1))
        self.lengths += ~finished
        self.bad |= slot < 0
        self.steps += 1
        return chosen

    def stop(self, request: BatchRequest, step: int, finished: Tensor) -> bool:
        """Hands the step's tokens on; whether all rows are known to be done. Raises PyargsError if a row had no choice."""
        if request.token_callback is not None:
            request.token_callback(self.tokens[: len(request.user), step].clone())
        if not self.late:
            return self._all_done(torch.cat([self.bad, finished.all().unsqueeze(0)]))
        if (step + 1) % CHUNK:
            return False
        asked, self._asked = self._asked, _on_its_way(torch.cat([self.bad, finished.all().unsqueeze(0)]))
        return asked is not None and self._all_done(asked())

    def decoded(self, request: BatchRequest, finished: Tensor) -> Decoded:
        """What was chosen for the request's rows. Raises PyargsError if a row had no choice."""
        rows = len(request.user)
        self._all_done(torch.cat([self.bad, finished.all().unsqueeze(0)]).cpu())
        used = int((self.lengths + finished)[:rows].max()) if rows else 0
        parts = (part[:rows, :used] for part in (self.tokens, self.rewards, self.slots, self.spreads))
        return Decoded(*(part.to("cpu", copy=True) for part in (*parts, self.lengths[:rows])))

    def _all_done(self, flags: Tensor) -> bool:
        """flags bool [B + 1]: rows that had no choice, and whether all have finished."""
        check_numbers(flags[:-1])
        return bool(flags[-1])


def _on_its_way(flags: Tensor) -> Callable[[], Tensor]:
    """Starts a copy to the host; what is returned waits for it."""
    if not flags.is_cuda:
        return flags.clone
    host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
    host.copy_(flags, non_blocking=True)
    arrived = torch.cuda.current_stream(flags.device).record_event()

    def read() -> Tensor:
        arrived.synchronize()
        return host

    return read
