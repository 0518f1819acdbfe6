"""The choice of the next token among scored candidates in plain PyTorch; csrc/kernels/choice.h is the same in C++ and CUDA."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def choose(
    logprobs: Tensor,
    reward: Tensor,
    reward_weight: Tensor,
    ids: Tensor,
    finished: Tensor,
    *,
    stop: Tensor | None = None,
    pad_id: int = 0,
    temperature: float | None = None,
    uniform: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chooses a candidate of each row by logprob + w * reward; w = 0 leaves the log-prob alone, whatever the reward.

    logprobs, reward float32 [B, k]; reward_weight float32 [B]; ids int64 [B, k]. finished bool [B]: rows that get
    token=pad_id, slot=0, reward=0. stop int64 [E]: ids that finish a row. The best score wins, and of equal ones the lower
    slot. With temperature > 0 and uniform float32 [B] in [0, 1) it is the first slot whose cumulated
    softmax(score / temperature) exceeds it.

    Returns token [B], slot [B], reward [B, k] and finished [B]. A score that is no number to choose by (see `broken`) gives
    slot=-1, token=pad_id and finished=True.
    """
    weight = reward_weight.unsqueeze(1)
    score = torch.where(weight == 0, logprobs, logprobs + weight * reward)
    bad = broken(score, logprobs, reward).any(1) & ~finished
    top = score.amax(1, keepdim=True)
    slot = (score == top).int().argmax(1)  # argmax of 0/1 takes the first
    if uniform is not None:
        p = torch.softmax((score.double() - top) / temperature, dim=1)
        passed = p.cumsum(1) > uniform.double().unsqueeze(1)
        last = (p > 0).int().cumsum(1).argmax(1)  # where rounding leaves none
        sampled = torch.where(passed.any(1), passed.int().argmax(1), last)
        slot = torch.where(top.squeeze(1) == -math.inf, slot, sampled)
    token, after = settle(ids.gather(1, slot.unsqueeze(1)).squeeze(1), finished, bad, stop, pad_id)
    return token, slot.masked_fill(bad, -1).masked_fill(finished, 0), reward.masked_fill(finished.unsqueeze(1), 0.0), after


def broken(score: Tensor, logprobs: Tensor, reward: Tensor) -> Tensor:
    """No score to choose by: NaN, +inf, or a finite log-prob and reward whose sum is beyond float32. -inf forbids a token."""
    return ~(score < math.inf) | ((score == -math.inf) & (logprobs > -math.inf) & (reward > -math.inf))


def settle(token: Tensor, finished: Tensor, bad: Tensor, stop: Tensor | None, pad_id: int) -> tuple[Tensor, Tensor]:
    """Chosen tokens [B] with pad_id where a row had finished or has no choice (bad), and which rows are finished now."""
    over = finished | bad
    return token.masked_fill(over, pad_id), over if stop is None else over | torch.isin(token, stop)
