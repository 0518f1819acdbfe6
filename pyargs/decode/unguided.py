"""Decoding of a language model by itself, or of a UserPolicy: the likeliest token, or a sample of all."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyargs.decode.request import Request
from pyargs.decode.rows import Rows, filtered, of_requests, room_to_tell, state_of, tell
from pyargs.ops import topk_logprobs
from pyargs.ops.choice import choose
from pyargs.ops.row_state import note, uniform


class Alone:
    """Rows that no reward guides. policy: the passes of the language model; soft: a `SoftPrompt`, whose embeddings stand
    before the prompts."""

    def __init__(self, policy, *, vocabulary: int, room: int, device, soft=None, adjust=None):
        self.policy, self.vocabulary, self.device, self.soft = policy, vocabulary, device, soft
        self.rows, self.halves = Rows(room, adjust), (policy,)

    def join(self, requests: Sequence[Request], capacity: int) -> None:
        more = {}
        if self.soft is not None:
            with self.soft.users.lock:
                more["soft"] = self.soft(self.soft.users.rows([one.user for one in requests]).to(self.device))
        self.rows.requests += requests
        self._ask()
        logits = self.policy.join([one.prompt for one in requests], capacity, **more)
        told = room_to_tell(self.rows, len(requests), self.device)
        self.rows.join(logits=self.rows.logits(logits, self.vocabulary), **of_requests(requests, self.device), **told)

    def choose(self) -> None:
        """Chooses the next token of each row that is here, and leaves it in the rows. Rewards and slots are 0."""
        rows, logits = self.rows, self.rows["logits"].float()
        zero = torch.zeros(len(logits), 1, dtype=torch.float32, device=self.device)
        score, greedy = logits.max(1)
        if rows.sampled:
            logprobs = logits.log_softmax(1)
            logprobs = filtered(rows, logprobs) if rows.narrowed else logprobs
            ids = torch.arange(logits.shape[1], device=self.device).expand_as(logits)
            token, slot, _, _ = choose(
                logprobs, zero.expand_as(logits), zero[:, 0], ids, rows["finished"], stop=rows["stop"],
                temperature=rows["temperature"], uniform=uniform(rows["noise"], rows["step"]),
            )  # fmt: skip
            # A greedy row takes the largest logit beside sampled rows, too: log_softmax may round two logits to one.
            token = torch.where((rows["temperature"] == 0) & (slot >= 0), greedy, token)
            slot = slot.clamp(max=0)
        else:
            token, slot = greedy, torch.where(score.isnan(), -1, 0)
        finished = rows["finished"] | (slot < 0) | (token.unsqueeze(1) == rows["stop"]).any(1)
        note(state_of(rows), token, slot, zero[:, 0], zero[:, 0], finished)
        if rows.telling:
            logprobs, candidates, total = topk_logprobs(logits, rows.most)
            own = logits.gather(1, token.clamp(min=0).unsqueeze(1)).squeeze(1) - total
            tell(rows, own, candidates, logprobs, torch.full_like(logprobs, torch.nan))

    def follow(self) -> None:
        """Appends the chosen tokens to the rows."""
        self.rows["logits"] = self.rows.logits(self.policy.advance(self.rows["token"]), self.vocabulary)

    def keep(self, order: Sequence[int]) -> None:
        """The rows at these positions stay, in this order."""
        self.rows.keep(order)
        self.policy.keep(order)
        self._ask()

    def current(self) -> bool:
        """Whether the weights are still those that the passes were made for. If they were copied, this reads all of them."""
        return self.policy.current()

    def _ask(self) -> None:
        """All logits must be exact where a row draws from them, log-probs are told, or a request changes them."""
        self.policy.top = 0 if self.rows.sampled or self.rows.telling or self.rows.adjusting else 1
