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
from torch.nn import functional as F

from pyargs.decode.request import Request, as_float
from pyargs.decode.rows import Rows, considered, of_requests, room_to_tell, state_of, tell
from pyargs.heads import Folded
from pyargs.lm.structure import as_written
from pyargs.ops import score_select, score_step, topk_logprobs
from pyargs.ops.row_state import RowState, choice_arguments, counts
from pyargs.ops.topk_logprobs import MAX_K
from pyargs.types import Users


class Passes(Protocol):
    """The passes of policy and reward model that a backend computes for the rows that are here.

    top: how many of a row's largest logits must be exact, 0 is all. screened: the others may be estimates, smaller than these.
    leaves_out: `branch` computes less where fewer candidates are wanted, and reads on the host how many.
    halves: what reads prompts in parts (`Steps.read`).
    """

    top: int
    screened: bool
    leaves_out: bool
    halves: tuple

    def join(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[Tensor, Tensor]:
        """Adds rows behind the others; returns the policy's logits [m, V] and the reward model's states [m, D] of their
        prompts' last tokens. capacity: places that the longest of them needs, its answer and candidates included."""

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
        self.halves = self.policy, self.scorer = policy, scorer

    def join(self, prompts: Sequence[Sequence[int]], capacity: int, theirs=None) -> tuple[Tensor, Tensor]:
        """theirs: the prompts as ids of the reward model, where it has a tokenizer of its own."""
        return self.policy.join(prompts, capacity), self.scorer.join(theirs or prompts, capacity)

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
    def leaves_out(self) -> bool:
        return self.scorer.leaves_out

    @property
    def top(self) -> int:
        return self.policy.top

    @top.setter
    def top(self, most: int) -> None:
        self.policy.top = most


CANDIDATES = "logprobs", "candidates"
"""Buffers of the policy's candidates."""


class Guided:
    """The rows that a RewardModel guides.

    passes: of policy and reward model; vocabulary: the tokens that can be chosen; room: the most rows. eos_reward: what a stop
    token earns; "before": the reward of the text so far, since a head is never trained on the state after a stop token;
    "state": the reward of that state. adjust: as of `Rows`.
    """

    def __init__(self, passes: Passes, model, *, vocabulary: int, room: int, eos_reward: str, adjust=None):
        self.passes, self.head, self.users = passes, model.head, model.users
        self.device, self.prefix_mean = model.device, model.step_reward == "prefix_mean"
        self.vocabulary, self.before = vocabulary, eos_reward == "before"
        self.rows, self.k, self.halves = Rows(room, adjust), 1, passes.halves
        self.one = torch.ones(1, 1, dtype=torch.float32, device=self.device)

    def join(self, requests: Sequence[Request], capacity: int) -> None:
        folded = folded_of(self.head, self.users, [one.user for one in requests], self.device)
        before = self._kept()
        self.rows.requests += requests
        self._ask()
        theirs = {} if requests[0].theirs is None else {"theirs": [one.theirs for one in requests]}
        logits, states = self.passes.join([one.prompt for one in requests], capacity, **theirs)
        own = of_requests(requests, self.device)
        so_far = clipped(rewards_of(folded, states.unsqueeze(1).to(self.device)), own["clip"]).squeeze(1)
        room = torch.zeros(len(requests), MAX_K, dtype=torch.float32, device=self.device)
        self.rows.join(
            logprobs=room, candidates=room.long(), so_far=so_far, total=torch.zeros_like(so_far), above=room[:, 0],
            **by_row(folded, len(requests)), **own, **room_to_tell(self.rows, len(requests), self.device),
        )  # fmt: skip
        self.folded = folded
        new = self._proposed(logits)
        if before:  # the others may have fewer; what stands behind a row's own is not looked at
            both = zip(before, new, strict=True)
            new = [torch.cat([F.pad(old, (0, one.shape[1] - old.shape[1])), one]) for old, one in both]
        self._keep(new)

    def choose(self) -> None:
        """Chooses the next token of each row that is here, and leaves it in the rows."""
        rows, k = self.rows, self.rows.most
        logprobs, candidates = self._kept()
        count = wanted = None
        if rows.clipped or rows.filtered and self.passes.leaves_out:
            count = counts(logprobs, rows["own_k"], rows["top_p"], rows["min_p"], rows["gap"] if rows.clipped else None)
            wanted = considered(rows, count, k) if self.passes.leaves_out else None
        hidden = as_float(self.passes.branch(candidates, wanted))
        folded = of_rows(self.folded, rows)
        sums = ["so_far"] * self.before + ["total"] * self.prefix_mean
        state = state_of(rows, *sums, count=count)
        features, bank = folded.scored(hidden)
        scored = features, folded.weight, rows.place[: rows.width]
        how = dict(bias=folded.bias, activation=folded.activation, bank=bank)
        rewards = self._rewards(scored, logprobs, candidates, state, how) if rows.telling or rows.clipped else None
        if rows.clipped:
            rewards = clipped(rewards, rows["clip"])
            scored, how = (rewards.unsqueeze(-1), self.one, scored[2]), {}
        score_step(*scored, logprobs, candidates, state, **how)
        if rows.telling:
            logprobs = logprobs + rows["above"].unsqueeze(1)
            slot = rows["chosen"][:, 1:2].long().clamp(min=0)
            tell(rows, logprobs.gather(1, slot).squeeze(1), candidates, logprobs, rewards)

    def _rewards(self, scored: tuple, logprobs: Tensor, candidates: Tensor, state: RowState, how: dict) -> Tensor:
        """The rewards [n, k] that the step is about to choose by, NaN behind a row's own candidates."""
        choice = choice_arguments(state, logprobs)
        rewards = score_select(*scored, logprobs=logprobs, ids=candidates, stop_reward=state.so_far, **how, **choice)[2]
        if choice["count"] is None:
            return rewards
        return rewards.masked_fill(~considered(self.rows, choice["count"], rewards.shape[1]), torch.nan)

    def follow(self, stay: bool = False) -> None:
        """Appends the chosen tokens to the rows, and finds the candidates of the next step. stay: not to those that have
        finished."""
        self._keep(self._proposed(self.passes.follow(self.rows["token"], self.rows["slot"], stay)))

    def keep(self, order: Sequence[int]) -> None:
        """The rows at these positions stay, in this order."""
        kept = [one[list(order)] for one in self._kept()]
        self.rows.keep(order)
        self.passes.keep(order)
        self._ask()
        if kept:
            self._keep([one[:, : self.rows.most] for one in kept])

    def _proposed(self, logits: Tensor) -> list[Tensor]:
        """The policy's candidates of rows with these logits [n, V]: log-probs, sorted, up to a constant of each row, and ids
        [n, k]."""
        logits = self.rows.logits(logits, self.vocabulary)
        logprobs, candidates, total = topk_logprobs(logits, self.rows.most)
        if self.passes.screened:  # all but the candidates' logits are estimates, and so is their sum: leave it out
            logprobs = logits.float().gather(1, candidates)
            first = logprobs[:, :1]
            logprobs = logprobs - first
            if self.rows.telling:  # then all are exact: the log-prob of the first one
                self.rows.buffers["above"][self.rows.width - len(logits) : self.rows.width] = first.squeeze(1) - total
        return [logprobs.to(self.device), candidates.to(self.device)]

    def _kept(self) -> list[Tensor]:
        """The candidates of the rows that are here: as `_proposed`. They stand side by side, k of them for each row, in front
        of a buffer that has room for more, so that its place never changes."""
        return [] if "logprobs" not in self.rows else [self._front(name, self.rows.width, self.k) for name in CANDIDATES]

    def _keep(self, candidates: Sequence[Tensor]) -> None:
        for name, one in zip(CANDIDATES, candidates, strict=True):
            self._front(name, *one.shape).copy_(one)
            self.k = one.shape[1]

    def _front(self, name: str, rows: int, k: int) -> Tensor:
        return self.rows.buffers[name].view(-1)[: rows * k].view(rows, k)

    def _ask(self) -> None:
        """All logits must be exact where log-probs are told, or a request changes them."""
        self.passes.top = 0 if self.rows.telling or self.rows.adjusting else self.rows.most

    @property
    def kind(self) -> tuple:
        """What operators a step has."""
        return self.rows.most, self.rows.filtered, self.rows.sampled, self.rows.telling, self.rows.clipped

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


def clipped(rewards: Tensor, limit: Tensor) -> Tensor:
    """Rewards [n, k], of each row within -limit [n] and limit."""
    return rewards.clamp(-limit.unsqueeze(1), limit.unsqueeze(1))


def rewards_of(folded: Folded, states: Tensor) -> Tensor:
    """Rewards [n, k] of states [n, k, D], as a step computes them."""
    rows, k, _ = states.shape
    zeros = torch.zeros(rows, k, dtype=torch.float32, device=states.device)
    features, bank = folded.scored(as_float(states))
    return score_select(
        features,
        folded.weight,
        torch.arange(rows, device=states.device),
        zeros[:, 0],
        zeros,
        zeros.long(),
        zeros[:, 0].bool(),
        bias=folded.bias,
        activation=folded.activation,
        bank=bank,
    )[2]
