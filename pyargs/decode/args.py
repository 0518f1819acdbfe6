"""ARGS: at each step the policy proposes k tokens, a reward model scores each for the row's user, the best sum is chosen.

score(v) = log pi(v | x, y_<t) + w r_u(v | x, y_<t), argmax (or a sample) over the policy's top k (eq. 1 of the paper).

The reward model sees the k candidates as k branches behind one shared prefix: they stand side by side as queries, each
masked to the prefix and itself, all at the same position. The winner's keys and values are then moved into the prefix. So
the prefix is stored once, not k times, and the winner is never computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from pyargs.decode.request import Request, as_float
from pyargs.decode.rows import Choice, Rows, chosen, considered, counts, note, of_requests, uniform
from pyargs.heads import Folded
from pyargs.lm.structure import as_written
from pyargs.ops import score_select, topk_logprobs
from pyargs.types import Users


class Passes(Protocol):
    """The passes of policy and reward model that a backend computes for the rows that are here.

    top: how many of a row's largest logits must be exact, 0 is all. screened: the others may be estimates, smaller than these.
    """

    top: int
    screened: bool

    def join(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[Tensor, Tensor]:
        """Adds rows behind the others; returns the policy's logits [m, V] and the reward model's states [m, D] of their
        prompts' last tokens. capacity: places that the longest of them needs, its answer and candidates included."""

    def read(self, prompt: Sequence[int], end: int, capacity: int) -> int:
        """Reads a prompt up to `end`; returns how many of its tokens are read. `join` has it first and reads the rest."""

    def unread(self) -> None:
        """The prompt of which a part was read does not come."""

    def branch(self, candidates: Tensor, wanted: Tensor | None) -> Tensor:
        """The reward model's states [n, k, D] of candidates [n, k]; those outside `wanted` bool [n, k] may be anything."""

    def follow(self, token: Tensor, slot: Tensor, stay: bool) -> Tensor:
        """Appends token [n], the candidate at slot [n], to each row; returns the next logits [n, V]. stay: some slots are -1,
        and leave their rows."""

    def keep(self, order: Sequence[int]) -> None:
        """The rows at these positions stay, in this order."""

    def current(self) -> bool:
        """Whether the weights are still those that the passes were made for. If they were copied, this reads all of them."""


class Two:
    """A policy and a reward model, each with passes of its own."""

    def __init__(self, policy, scorer):
        self.policy, self.scorer = policy, scorer

    def join(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[Tensor, Tensor]:
        return self.policy.join(prompts, capacity), self.scorer.join(prompts, capacity)

    def read(self, prompt: Sequence[int], end: int, capacity: int) -> int:
        return min(half.read(prompt, end, capacity) for half in (self.policy, self.scorer))

    def unread(self) -> None:
        self.policy.unread()
        self.scorer.unread()

    def branch(self, candidates: Tensor, wanted: Tensor | None = None) -> Tensor:
        return self.scorer.branch(candidates, wanted)

    def follow(self, token: Tensor, slot: Tensor, stay: bool = False) -> Tensor:
        self.scorer.commit(token, slot)
        return self.policy.advance(token, slot >= 0 if stay else None)

    def keep(self, order: Sequence[int]) -> None:
        self.policy.keep(order)
        self.scorer.keep(order)

    def current(self) -> bool:
        return self.policy.current() and self.scorer.current()

    @property
    def screened(self) -> bool:
        return self.policy.screened

    @property
    def top(self) -> int:
        return self.policy.top

    @top.setter
    def top(self, most: int) -> None:
        self.policy.top = most

    @property
    def caches(self) -> tuple:
        return *self.policy.caches, *self.scorer.caches


class Guided:
    """The rows that a RewardModel guides.

    passes: of policy and reward model; vocabulary: the tokens that can be chosen; room: the most rows. eos_reward: what a stop
    token earns; "before": the reward of the text so far, since a head is never trained on the state after a stop token;
    "state": the reward of that state.
    """

    def __init__(self, passes: Passes, model, *, vocabulary: int, room: int, eos_reward: str):
        self.passes, self.head, self.users = passes, model.head, model.users
        self.device, self.prefix_mean = model.device, model.step_reward == "prefix_mean"
        self.vocabulary, self.before = vocabulary, eos_reward == "before"
        self.rows = Rows(room)

    def join(self, requests: Sequence[Request], capacity: int) -> None:
        self.rows.requests += requests
        self.passes.top = self.rows.most
        folded = folded_of(self.head, self.users, [one.user for one in requests], self.device)
        logits, states = self.passes.join([one.prompt for one in requests], capacity)
        so_far = rewards_of(folded, states.unsqueeze(1).to(self.device)).squeeze(1)
        self.rows.join(
            logits=as_float(logits), so_far=so_far, total=torch.zeros_like(so_far), **by_row(folded, len(requests)),
            **of_requests(requests, self.device),
        )  # fmt: skip
        self.folded = folded

    def read(self, prompt: Sequence[int], end: int, capacity: int) -> int:
        """Reads a prompt up to `end`; returns how many of its tokens are read. `join` has it first and reads the rest."""
        return self.passes.read(prompt, end, capacity)

    def unread(self) -> None:
        """The prompt of which a part was read does not come."""
        self.passes.unread()

    def choose(self) -> Choice:
        """Chooses the next token of each row that is here."""
        rows, k = self.rows, self.rows.most
        logits = rows["logits"][:, : self.vocabulary]
        logprobs, candidates, _ = topk_logprobs(logits, k)
        if self.passes.screened:  # all but the candidates' logits are estimates, and so is their sum: leave it out
            logprobs = logits.float().gather(1, candidates)
            logprobs = logprobs - logprobs[:, :1]
        logprobs, candidates = logprobs.to(self.device), candidates.to(self.device)
        count = counts(rows, logprobs) if rows.filtered else None
        wanted = None if count is None else considered(rows, count, k)
        hidden = as_float(self.passes.branch(candidates, wanted))
        folded = of_rows(self.folded, rows)
        step = rows["step"] + 1 if self.prefix_mean else None
        token, slot, reward, finished = score_select(
            folded.features(hidden, folded.own),
            folded.weight,
            rows.place[: rows.width],
            # The mean over the response so far differs between candidates only in their own share of it.
            rows["reward_weight"] / step if self.prefix_mean else rows["reward_weight"],
            logprobs,
            candidates,
            rows["finished"],
            bias=folded.bias,
            activation=folded.activation,
            count=count,
            stop=rows["stop"],
            stop_reward=rows["so_far"] if self.before else None,
            temperature=rows["temperature"] if rows.sampled else None,
            uniform=uniform(rows) if rows.sampled else None,
        )
        choice = note(rows, token, slot, *chosen(rows, slot, reward, count), finished)
        if self.prefix_mean and self.before:
            rows["total"].add_(choice.reward)
            rows["so_far"] = rows["total"] / step
        elif self.before:
            rows["so_far"] = choice.reward
        return choice

    def follow(self, choice: Choice, stay: bool = False) -> None:
        """Appends the chosen tokens to the rows. stay: not to those that have finished."""
        slot = choice.slot.masked_fill(choice.finished, -1) if stay else choice.slot
        self.rows["logits"] = as_float(self.passes.follow(choice.token, slot, stay))

    def keep(self, order: Sequence[int]) -> None:
        """The rows at these positions stay, in this order."""
        self.rows.keep(order)
        self.passes.keep(order)
        self.passes.top = self.rows.most

    def current(self) -> bool:
        """Whether the weights are still those that the passes were made for. If they were copied, this reads all of them."""
        return self.passes.current()


def folded_of(head, users: Users, names: Sequence[str], device) -> Folded:
    """The head for these users, whoever else comes or leaves meanwhile. Raises UnknownUser."""
    with users.lock:
        return _folded(head, users.rows(names).to(device))


def _folded(head, user: Tensor) -> Folded:
    """The head for users [n]. One with a hook, or a part that its library did not write, is not folded but called."""
    if as_written(head):
        return head.fold(user)

    def features(states: Tensor, own: Tensor) -> Tensor:
        return as_float(head(states, own.unsqueeze(1).expand(states.shape[:2]))).unsqueeze(-1)

    return Folded(features, torch.ones(len(user), 1, dtype=torch.float32, device=user.device), own=user)


PARTS = "weight", "bias", "own"
"""Of a folded head, what each row has of its own in the buffers."""


def by_row(folded: Folded, count: int) -> dict[str, Tensor | None]:
    """The parts of a head that was folded for `count` rows, a shared one once for each."""
    parts = {name: getattr(folded, name) for name in PARTS}
    return {name: None if part is None else part.detach().expand(count, *part.shape[1:]) for name, part in parts.items()}


def of_rows(folded: Folded, rows: Rows) -> Folded:
    """The head with the parts of all rows that are here."""
    return folded._replace(**{name: rows[name] if name in rows else None for name in PARTS})


def rewards_of(folded: Folded, states: Tensor) -> Tensor:
    """Rewards [n, k] of states [n, k, D], as a step computes them."""
    rows, k, _ = states.shape
    zeros = torch.zeros(rows, k, dtype=torch.float32, device=states.device)
    return score_select(
        folded.features(as_float(states), folded.own),
        folded.weight,
        torch.arange(rows, device=states.device),
        zeros[:, 0],
        zeros,
        zeros.long(),
        zeros[:, 0].bool(),
        bias=folded.bias,
        activation=folded.activation,
    )[2]
