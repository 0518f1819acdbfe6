"""Decoding on a CPU through the native stack, which reads the weights once at the rate of the memory.

Where policy and reward model rest on the same weights, one pass serves both. A frozen backbone's states of the candidates are
the policy's too. With LoRA, the policy's rows of the likeliest candidates ride in the reward model's pass; if another one
wins, its row takes a pass more. A token's state is the same, bit by bit, in whatever pass it is computed, so guessing the
winner changes no token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyargs.decode.request import Request, check_numbers
from pyargs.lm import lora
from pyargs.lm.forward import plain_output_layer
from pyargs.lm.stack import keep, run
from pyargs.lm.tokenize import left_pad
from pyargs.models.reward_model import RewardModel

GUESSES = {1: 2, 2: 1}
"""Rows of a batch -> of how many candidates the policy's rows ride along. In larger batches some row nearly always misses, and
the reward model's rows alone keep the processor busy (docs/performance.md)."""


def possible(policy, reward_model: RewardModel | None = None) -> bool:
    """Whether the native stack computes what these models do as they are now, on this machine."""
    models = [policy] if reward_model is None else [policy, reward_model.backbone]
    return all(keep.can_pack(model) for model in models) and plain_output_layer(policy)


def of(policy, reward_model: RewardModel, rows: int, capacity: int) -> TwoStacks | OneStack:
    """The passes of a batch of `rows`, with room for `capacity` tokens each, branches included."""
    backbone = reward_model.backbone
    if not lora.same_weights(policy.get_decoder(), backbone):
        return TwoStacks(keep.stack_of(policy), keep.stack_of(backbone), rows, capacity)
    adapted = lora.active(backbone)
    return OneStack(keep.stack_of(policy, backbone if adapted else None), adapted, rows, capacity)


class TwoStacks:
    """Policy and reward model each through a stack of its own."""

    def __init__(self, policy: run.Stack, backbone: run.Stack, rows: int, capacity: int):
        self.policy, self.backbone = policy, backbone
        self.policy_cache, self.reward_cache = policy.cache(rows, capacity), backbone.cache(rows, capacity)

    def begin(self, request: Request) -> tuple[Tensor, Tensor]:
        ids, mask = request.input_ids, request.attention_mask
        self.wanted = _wanted(request)
        state = self.policy(ids, self.policy_cache, mask)[:, -1]
        return self.policy.logits(state, **self.wanted), self.backbone(ids, self.reward_cache, mask)[:, -1]

    def branch(self, candidates: Tensor, finished: Tensor) -> Tensor:
        return self.backbone(candidates, self.reward_cache, _for(candidates, finished), branches=True)

    def follow(self, token: Tensor, slot: Tensor, finished: Tensor) -> Tensor:
        self.backbone.commit(self.reward_cache, slot.masked_fill(finished, -1))
        ids = token.unsqueeze(1)
        return self.policy.logits(self.policy(ids, self.policy_cache, _for(ids, finished))[:, 0], **self.wanted)


class OneStack:
    """Policy and reward model on the same weights. Rows 0 .. B of the cache are the policy's; with LoRA (`adapted`) the reward
    model has B more."""

    def __init__(self, stack: run.Stack, adapted: bool, rows: int, capacity: int):
        self.stack, self.adapted = stack, adapted
        self.cache = stack.cache(rows * 2 if adapted else rows, capacity)

    def begin(self, request: Request) -> tuple[Tensor, Tensor]:
        ids, mask, rows = request.input_ids, request.attention_mask, len(request.input_ids)
        self.wanted = _wanted(request)
        if self.adapted:
            ids, mask = ids.repeat(2, 1), mask.repeat(2, 1)
        state = self.stack(ids, self.cache, mask, delta=self._delta(rows))[:, -1]
        return self.stack.logits(state[:rows], **self.wanted), state[-rows:]

    def branch(self, candidates: Tensor, finished: Tensor) -> Tensor:
        wanted = _for(candidates, finished)
        if not self.adapted:
            self.states = self.stack(candidates, self.cache, wanted, branches=True)
            return self.states
        rows = len(candidates)
        guesses = GUESSES.get(rows, 0)
        mask = torch.cat([wanted, wanted])
        mask[:rows, guesses:] = False
        states = self.stack(candidates.repeat(2, 1), self.cache, mask, branches=True, delta=self._delta(rows))
        self.states = states[:rows, :guesses]
        return states[rows:]

    def follow(self, token: Tensor, slot: Tensor, finished: Tensor) -> Tensor:
        hit = (slot < self.states.shape[1]) & ~finished
        committed = torch.cat([slot.where(hit, -1), slot.masked_fill(finished, -1)])
        self.stack.commit(self.cache, committed if self.adapted else committed[: len(slot)])
        state = self.states.new_zeros(len(slot), self.stack.dim)
        state[hit] = self.states[hit, slot[hit]]
        missed = (~hit & ~finished).nonzero().flatten()
        if len(missed):
            state[missed] = self.stack(token[missed].unsqueeze(1), self.cache, rows=missed)[:, 0]
        return self.stack.logits(state, **self.wanted)

    def _delta(self, rows: int) -> Tensor | bool:
        return torch.arange(2 * rows, device="cpu") >= rows if self.adapted else False


def greedy(lm, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, vocabulary: int, stop: list[int], pad: int) -> Tensor:
    """The likeliest of the first `vocabulary` tokens, step by step, int64 [B, N]; behind a stop token stands `pad`.

    What prompts have in common with one before them, the demonstrations of one user say, is computed once.
    """
    stack, rows = keep.stack_of(lm), len(prompts)
    cache = stack.cache(rows, max(map(len, prompts)) + max_new_tokens)
    state, going = _read(stack, cache, prompts), torch.arange(rows, device="cpu")
    tokens, stops = torch.full((rows, max_new_tokens), pad, device="cpu"), torch.tensor(stop, dtype=torch.long, device="cpu")
    for step in range(max_new_tokens):
        score, token = stack.logits(state, top=1, vocabulary=vocabulary).max(1)
        check_numbers(torch.zeros(rows, dtype=torch.bool, device="cpu").index_put((going,), score.isnan()))
        tokens[going, step] = token
        on = ~torch.isin(token, stops)
        going, token = going[on], token[on]
        if not len(going) or step + 1 == max_new_tokens:
            return tokens[:, : step + 1]
        state = stack(token.unsqueeze(1), cache, rows=going)[:, 0]
    return tokens


def _read(stack: run.Stack, cache: run.Cache, prompts: Sequence[Sequence[int]]) -> Tensor:
    """The prompts' last states [B, D], in two passes: prompts that begin as none before them, then what others add to those.

    A prompt is continued from the last of the first kind if it takes half of its tokens over.
    """
    source, known = [], []
    for row, prompt in enumerate(prompts):
        same = run.shared(prompts[source[-1]], prompt) if source else 0
        own = 2 * same < len(prompt)
        source.append(row if own else source[-1])
        known.append(0 if own else same)
    state = torch.empty(len(prompts), stack.dim, dtype=torch.float32, device="cpu")
    for continued in (False, True):
        rows = [row for row, other in enumerate(source) if (row != other) == continued]
        for row in rows if continued else ():
            cache.copy(row, source[row], known[row])
        if rows:
            ids, mask = left_pad([prompts[row][known[row] :] for row in rows], 0)
            state[rows] = stack(ids, cache, mask, rows=rows)[:, -1]
    return state


def _wanted(request: Request) -> dict[str, int]:
    """Of the logits: only the candidates' need to be exact. What the others are off by moves all log-probs of a step alike."""
    return {"top": request.num_candidates, "vocabulary": request.vocabulary}


def _for(ids: Tensor, finished: Tensor) -> Tensor:
    """Which of ids [B, n] to compute: those of rows that go on."""
    return ~finished.unsqueeze(1).expand(ids.shape)
