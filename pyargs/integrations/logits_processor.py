"""`RewardLogitsProcessor`: rewards inside `generate`, pipelines, or anybody's loop that takes a logits processor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor
from transformers import LogitsProcessor

from pyargs.decode.args import clipped
from pyargs.decode.request import Request, as_float, bounds, integer, no_choice, number, stop_tokens, weights
from pyargs.decode.scorer import Scorer
from pyargs.errors import PyargsError
from pyargs.integrations.generation_config import padding_of
from pyargs.lm.loading import same_tokenizer
from pyargs.ops import topk_logprobs
from pyargs.ops.choice import broken
from pyargs.ops.topk_logprobs import MAX_K
from pyargs.user_ids import user_ids


@dataclass
class _Row:
    """A row of the last call. owner: whose, by the place of its prompt; pad: how many tokens pad it on the left; text: its
    tokens without these; name: in the scorer; so_far: the reward of its text; rewards: of the candidates behind it."""

    owner: int
    pad: int
    text: list[int]
    name: int = -1
    so_far: float = 0.0
    rewards: dict[int, float] = field(default_factory=dict)


class RewardLogitsProcessor(LogitsProcessor):
    """log pi + w r on the policy's `num_candidates` likeliest tokens, -inf elsewhere.

    model: a RewardModel, with the policy's tokenizer. users: one id for each prompt; reward_weight: w, raw, one for all or one
    each. reward_clip, min_p: as for `Engine.submit`, but that all which min_p leaves are rewarded, since no call says how a
    token is chosen. With several rows for each prompt (beams, samples) a prompt's rows stand together, as in `generate`.
    eos_token_id: the policy's stop tokens (`lm.generation_config.eos_token_id`), which earn the reward of the text before them
    (eos_reward="before", the default) or their own ("state"). num_beams: as of `generate`. attention_mask: of the prompts,
    int64 [B, T], where they are padded, always on the left; set the attribute anew with each padded batch. tokenizer: the
    policy's, which no call shows, so that another one than the model's is refused. backend: as for `Engine`.

    It keeps a cache of each row, and finds the rows of a call by their tokens: rows may be reordered by beams, end, or begin
    anew with other prompts. What a call gives is what a new processor would give. In a loop where rows leave, tell it by
    `keep`. The log-probabilities are of the scores as they are handed in, normed. One thread at a time may use it.

    Raises PyargsError for a model whose reward is a mean over the answer, since no call says where a prompt ends; for rows
    that may be of several users; for fewer candidates than beams need.
    """

    supports_continuous_batching = False

    def __init__(
        self,
        model,
        users: Sequence[str],
        *,
        reward_weight: float | Sequence[float] | Tensor,
        eos_token_id: int | Sequence[int] | None,
        reward_clip: float | None = None,
        num_candidates: int = 10,
        min_p: float = 0.0,
        num_beams: int = 1,
        eos_reward: str = "before",
        attention_mask: Tensor | None = None,
        tokenizer=None,
        backend: str = "auto",
    ):
        if eos_reward not in ("before", "state"):
            raise PyargsError(f"eos_reward is 'before' or 'state', not {eos_reward!r}")
        self.model, self.users, self.backend = model, user_ids(users), backend
        if not self.users:
            raise PyargsError("name one user for each prompt")
        self._scorer = Scorer(model, backend=backend, max_rows=len(self.users))
        if model.step_reward == "prefix_mean":
            raise PyargsError(
                "this model's reward is a mean over the answer, and no call says where it begins: take pyargs.guide"
            )
        if None not in (tokenizer, model.tokenizer) and not same_tokenizer(tokenizer, model.tokenizer):
            raise PyargsError("policy and reward model have different tokenizers: take pyargs.guide, which reads texts")
        model.users.rows(self.users)  # UnknownUser now, not in the first step
        self.weights = weights(reward_weight, len(self.users)).expand(len(self.users)).tolist()
        self.stops = [] if eos_token_id is None else list(stop_tokens(None, eos_token_id, "eos_token_id"))
        self.before = eos_reward == "before"
        self.num_candidates = integer("num_candidates", num_candidates, 1, MAX_K)
        self.min_p = number("min_p", min_p, 0.0, 1.0)
        clip = None if reward_clip is None else number("reward_clip", reward_clip, 0.0, above=True)
        self.limits = [bounds(Request((), reward_weight=weight, reward_clip=clip))[0] for weight in self.weights]
        self.num_beams = integer("num_beams", num_beams, 1)
        self._check_beams(self.num_beams)
        self.attention_mask = attention_mask
        self._rows: list[_Row] = []
        self._names = count()

    @property
    def attention_mask(self) -> Tensor | None:
        """Of the prompts that come next."""
        return self._mask

    @attention_mask.setter
    def attention_mask(self, mask: Tensor | None) -> None:
        self._mask, self._padded = mask, False

    def keep(self, rows: Sequence[int] | Tensor) -> None:
        """Of the rows of the last call those at these positions stay, in this order."""
        places = [integer("a row", row, 0, len(self._rows) - 1) for row in rows]
        if len(set(places)) < len(places):
            raise PyargsError("a row is named twice: each may stay once")
        self._rows = [self._rows[place] for place in places]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids int64 [B, T], scores [B, V], logits or log-probabilities -> as `scores`."""
        with torch.inference_mode(False), torch.no_grad():
            self._follow(self._found(input_ids))
            return self._score(scores) if len(scores) else scores.clone()

    # -- which rows these are ------------------------------------------------------------------------------------------

    def _found(self, input_ids: Tensor) -> list[_Row]:
        """The rows of a call: whose each is, and its tokens."""
        ids, old = input_ids.tolist(), self._rows
        if self._mask is not None:
            return self._with_mask(input_ids)
        if len(ids) == len(old):
            found = [_Row(row.owner, row.pad, one[row.pad :]) for row, one in zip(old, ids, strict=True)]
            return [self._checked(place, row) for place, row in enumerate(found)]
        found = [[_Row(row.owner, row.pad, one[row.pad :]) for row in old if _goes_on(row, one[row.pad :])] for one in ids]
        if not any(found):
            return self._begun(ids, [0] * len(ids))
        for several in found:
            if len({self._wish(row.owner) for row in several}) != 1:
                raise PyargsError(
                    f"{len(ids)} rows after {len(old)}, and {'whose they are' if several else 'where one comes from'} cannot "
                    "be seen in their tokens: say processor.keep(the positions of those that stay)"
                )
        return [several[0] for several in found]

    def _with_mask(self, input_ids: Tensor) -> list[_Row]:
        """Rows of a batch whose attention mask was just given."""
        mask, self._mask = torch.as_tensor(self._mask), None
        if mask.ndim != 2 or len(input_ids) % len(mask) or input_ids.shape[1] < mask.shape[1]:
            raise PyargsError(
                f"attention_mask is {list(mask.shape)}, input_ids {list(input_ids.shape)}: give the prompts' own"
            )
        mask = mask.repeat_interleave(len(input_ids) // len(mask), 0)
        pads = padding_of(input_ids[:, : mask.shape[1]], mask.to(input_ids.device))
        self._padded = any(pads)
        return self._begun(input_ids.tolist(), pads, masked=True)

    def _begun(self, ids: list[list[int]], pads: list[int], masked: bool = False) -> list[_Row]:
        """Rows with new prompts, each prompt's rows together."""
        copies, left = divmod(len(ids), len(self.users))
        if left:
            raise PyargsError(
                f"{len(ids)} rows for {len(self.users)} users: name one user for each prompt, or say which rows keep"
            )
        if self.num_beams > 1 and copies not in (0, self.num_beams):
            raise PyargsError(f"{copies} rows for each prompt, but num_beams={self.num_beams}: give that of generate")
        if not masked:
            self._check_padding(ids)
        return [_Row(row // copies, pad, one[pad:]) for row, (one, pad) in enumerate(zip(ids, pads, strict=True))]

    def _checked(self, place: int, row: _Row) -> _Row:
        """A row that stands where one of the last call stood. Raises PyargsError where it goes on with another user's text."""
        if _goes_on(self._rows[place], row.text):
            return row
        others = [one for one in self._rows if _goes_on(one, row.text)]
        if any(self._wish(one.owner) == self._wish(row.owner) for one in others):
            self._check_beams(sum(one.owner == row.owner for one in self._rows))
            return row
        if others:
            raise PyargsError(
                f"row {place} goes on with the text of another user's row: say processor.keep(the new order) first"
            )
        self._check_padding([row.text])
        return row

    def _wish(self, owner: int) -> tuple:
        return self.users[owner], self.weights[owner]

    def _check_padding(self, ids: list[list[int]]) -> None:
        pad = getattr(self.model.tokenizer, "pad_token_id", None)
        if self._padded or pad is not None and any(one[0] == pad for one in ids):
            raise PyargsError("new prompts, which may be padded: set processor.attention_mask to their mask (of ones, if not)")

    def _check_beams(self, beams: int) -> None:
        if beams > 1 and self.min_p:
            raise PyargsError("min_p may leave fewer candidates than beams go on from: leave it out")
        needed = max(2, 1 + len(self.stops)) * beams
        if beams > 1 and self.num_candidates < needed:
            raise PyargsError(
                f"{beams} beams with {len(self.stops)} stop tokens go on from {needed} candidates, and there are only "
                f"{self.num_candidates}: pass num_candidates={needed} or more"
            )

    # -- their caches --------------------------------------------------------------------------------------------------

    def _follow(self, new: list[_Row]) -> None:
        """The scorer's rows become these: by a token more where that can be, read anew otherwise."""
        free, steps, stay, read = list(self._rows), [], [], []
        if len(new) > self._scorer.max_rows:
            self._scorer, free = Scorer(self.model, backend=self.backend, max_rows=len(new)), []
        for place, row in enumerate(new):
            own = free.index(self._rows[place]) if place < len(self._rows) and self._rows[place] in free else -1
            order = [own, *range(len(free))] if own >= 0 else range(len(free))
            found = next(
                (i for i in order if self._wish(free[i].owner) == self._wish(row.owner) and _goes_on(free[i], row.text)), None
            )
            if found is None:
                read.append(row)
                continue
            old = free.pop(found)
            row.name, row.so_far, row.rewards = old.name, old.so_far, old.rewards
            (stay if old.text == row.text else steps).append(row)
        known = [row for row in steps if row.text[-1] in row.rewards]
        if not self._scorer.shared and len(known) < len(new):  # their rows come in, and go on, together
            known, steps, stay, read = [], [], [], list(new)
        here = {row.name for row in (*steps, *stay)}
        self._scorer.drop([name for name in self._scorer.rows if name not in here])
        self._advance(known)
        odd = [row for row in steps if row.text[-1] not in row.rewards]
        if odd:  # no candidate: a forced token, or padding
            rewards = self._scorer.score([[row.text[-1]] for row in odd], [row.name for row in odd])
            for row, reward in zip(odd, rewards[:, 0].tolist(), strict=True):
                row.rewards = {row.text[-1]: reward}
            self._advance(odd)
        if read:
            for row in read:
                row.name = next(self._names)
            users = [self.users[row.owner] for row in read]
            rewards = self._scorer.prefill([row.name for row in read], [row.text for row in read], users)
            for row, reward in zip(read, rewards.tolist(), strict=True):
                row.so_far = reward
        self._rows = new

    def _advance(self, rows: list[_Row]) -> None:
        if rows:
            self._scorer.advance([row.name for row in rows], [row.text[-1] for row in rows])
            for row in rows:
                row.so_far = row.rewards[row.text[-1]]

    # -- their scores --------------------------------------------------------------------------------------------------

    def _score(self, scores: Tensor) -> Tensor:
        known = self._scorer.known
        tokens = scores.shape[1] if self.model.tokenizer is None else min(scores.shape[1], len(self.model.tokenizer))
        if tokens > known:
            raise PyargsError(
                f"the policy can choose among {tokens} tokens, but the reward model knows {known}: they do not fit"
            )
        if tokens < self.num_candidates:
            raise PyargsError(f"num_candidates is {self.num_candidates}, but there are only {tokens} tokens: pass fewer")
        logprobs, candidates, _ = topk_logprobs(as_float(scores)[:, :tokens], self.num_candidates)
        left = ~((logprobs - logprobs[:, :1]).double().exp() < self.min_p)
        rewards = self._scorer.score(candidates.masked_fill(~left, -1), [row.name for row in self._rows])
        for row, own, these in zip(self._rows, candidates.tolist(), rewards.tolist(), strict=True):
            row.rewards = {token: reward for token, reward in zip(own, these, strict=True) if not math.isnan(reward)}
        put = lambda values: torch.tensor(values, dtype=torch.float32, device=scores.device).unsqueeze(1)  # noqa: E731
        rewards, logprobs = rewards.to(scores.device).where(left, 0.0), logprobs.masked_fill(~left, -torch.inf)
        if self.before and self.stops:
            stops = torch.isin(candidates, torch.tensor(self.stops, device=candidates.device))
            rewards = torch.where(stops, put([row.so_far for row in self._rows]), rewards)
        rewards = clipped(rewards, put([self.limits[row.owner] for row in self._rows]).squeeze(1))
        weight = put([self.weights[row.owner] for row in self._rows])
        chosen_by = torch.where(weight == 0, logprobs, logprobs + weight * rewards)
        if bad := broken(chosen_by, logprobs, rewards).any(1).nonzero().flatten().tolist():
            raise no_choice(f"row(s) {bad}")
        return torch.full_like(scores, -torch.inf).scatter(1, candidates, chosen_by.to(scores.dtype))


def _goes_on(old: _Row, text: list[int]) -> bool:
    """Whether a text is that of a row, or has one token more."""
    return text == old.text or text[:-1] == old.text
