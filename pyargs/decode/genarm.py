"""Guided decoding with a TokenReward (GenARM): one pass of it rewards all tokens, so candidates are not run one by one.

score(v) = log pi(v | x, y_<t) + w log pi_r(v | x, y_<t). Over the policy's top k the best one is taken, as in ARGS; over the
whole vocabulary with a temperature this is GenARM's own rule, which samples from softmax(score).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyargs.decode.request import Request, as_float
from pyargs.decode.rows import Rows, filtered, of_requests, room_to_tell, state_of, tell
from pyargs.ops import tokenwise_select, tokenwise_step, topk_logprobs
from pyargs.ops.choice import choose
from pyargs.ops.row_state import RowState, choice_arguments, note, reward_at, spread_of


class Tokenwise:
    """The rows that a TokenReward guides. policy, reward: passes of the two language models, each a policy's half."""

    head = folded = None  # of a RewardModel

    def __init__(self, policy, reward, *, vocabulary: int, room: int, device, adjust=None):
        self.halves = self.policy, self.reward = policy, reward
        self.rows, self.vocabulary, self.device = Rows(room, adjust), vocabulary, device
        policy.top = reward.top = 0  # both are normed over the vocabulary

    def join(self, requests: Sequence[Request], capacity: int) -> None:
        self.rows.requests += requests
        logits, rewards = (half.join([one.prompt for one in requests], capacity) for half in (self.policy, self.reward))
        logits, rewards = self._both(logits, rewards)
        told = room_to_tell(self.rows, len(requests), self.device)
        self.rows.join(logits=logits, rewards=rewards, **of_requests(requests, self.device), **told)

    def choose(self) -> None:
        """Chooses the next token of each row that is here, and leaves it in the rows. A stop token has its own reward, since a
        TokenReward learns to stop."""
        self._choose()
        rows = self.rows
        if rows.telling:
            logprobs, candidates, total = topk_logprobs(rows["logits"], rows.most)
            token = rows["token"].unsqueeze(1)
            rewards = rows["rewards"].float().log_softmax(1).gather(1, candidates)
            tell(rows, rows["logits"].float().gather(1, token).squeeze(1) - total, candidates, logprobs, rewards)

    def _choose(self) -> None:
        rows, most, unlimited = self.rows, self.rows.most, self.rows.unlimited
        logits, rewards, state = rows["logits"], rows["rewards"], state_of(rows)
        if unlimited == "none":
            return tokenwise_step(logits, rewards, most, state)
        among_all = self._among_all(state)
        if unlimited == "all":
            return note(state, *among_all)
        choice = choice_arguments(state, topk_logprobs(logits, most)[0])
        token, slot, reward, finished = tokenwise_select(logits, rewards, k=most, **choice)
        among_k = token, slot, reward_at(slot, reward), spread_of(reward, choice["count"]), finished
        note(state, *(torch.where(rows["own_k"] == 0, one, other) for one, other in zip(among_all, among_k, strict=True)))

    def follow(self, stay: bool = False) -> None:
        """Appends the chosen tokens to the rows. stay: not to those that have finished."""
        token, going = self.rows["token"], ~self.rows["finished"] if stay else None
        both = self._both(self.policy.advance(token, going), self.reward.advance(token, going))
        self.rows["logits"], self.rows["rewards"] = both

    def _both(self, logits: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the policy and of the reward model, as the rows keep them."""
        rewards = as_float(rewards)[:, : self.vocabulary]
        return self.rows.logits(logits, self.vocabulary).to(self.device), rewards.to(self.device)

    def keep(self, order: Sequence[int]) -> None:
        """The rows at these positions stay, in this order."""
        for part in (self.rows, self.policy, self.reward):
            part.keep(order)

    def current(self) -> bool:
        """Whether the weights are still those that the passes were made for. If they were copied, this reads all of them."""
        return self.policy.current() and self.reward.current()

    @property
    def kind(self) -> tuple:
        """What operators a step has."""
        rows = self.rows
        return rows.most, rows.filtered, rows.narrowed, rows.sampled, rows.unlimited, rows.telling

    def _among_all(self, state: RowState) -> tuple[Tensor, ...]:
        """The choice among all tokens: the token, its rank under the policy (-1: not a number), its reward, no spread, and
        which rows are finished."""
        rows = self.rows
        logprobs, rewards = (rows[name].float().log_softmax(1) for name in ("logits", "rewards"))
        allowed = filtered(rows, logprobs) if rows.narrowed else logprobs
        ids = torch.arange(logprobs.shape[1], device=logprobs.device).expand_as(logprobs)
        choice = choice_arguments(state._replace(own_k=None), logprobs)
        token, slot, rewards, after = choose(allowed, rewards, ids=ids, **choice)
        place = slot.clamp(min=0).unsqueeze(1)  # the candidates stand in order of their ids
        rank = (logprobs > logprobs.gather(1, place)).sum(1).masked_fill(rows["finished"], 0).masked_fill(slot < 0, -1)
        reward = rewards.gather(1, place).squeeze(1)
        return token, rank, reward, torch.zeros_like(reward), after
