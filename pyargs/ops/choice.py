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
    temperature: float | Tensor | None = None,
    uniform: Tensor | None = None,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chooses a candidate of each row by logprob + w * reward; w = 0 leaves the log-prob alone, whatever the reward.

    logprobs, reward float32 [B, k]; reward_weight float32 [B]; ids int64 [B, k]. finished bool [B]: rows that get
    token=pad_id, slot=0, reward=0. stop int64 [E], or [B, E] for each row its own: ids that finish a row. The best score wins,
    and of equal ones the lower slot. With temperature > 0 and uniform float32 [B] in [0, 1) it is the first slot whose
    cumulated softmax(score / temperature) exceeds it. A temperature of float32 [B] gives each row its own, where 0 is greedy.
    count int64 [B]: only the first count of a row's candidates are considered (all where it is None).

    Returns token [B], slot [B], reward [B, k] (0 where a candidate is not considered) and finished [B]. A score that is no
    number to choose by (see `broken`), a count outside of 1 to k, and a row's temperature that is negative or not finite give
    slot=-1, token=pad_id and finished=True.
    """
    considered = considered_of(ids, count)
    weight = reward_weight.unsqueeze(1)
    score = torch.where(weight == 0, logprobs, logprobs + weight * reward)
    bad = (broken(score, logprobs, reward) & considered).any(1) | ~considered.any(1)
    score = score.masked_fill(~considered, -math.inf)
    top = score.amax(1, keepdim=True)
    slot = (score == top).int().argmax(1)  # argmax of 0/1 takes the first
    if uniform is not None:
        greedy = top == -math.inf
        if isinstance(temperature, Tensor):
            temperature = temperature.unsqueeze(1)
            greedy |= temperature == 0
            bad |= ~((temperature >= 0) & (temperature < math.inf)).squeeze(1)
        p = torch.softmax((score.double() - top) / temperature, dim=1)
        passed = p.cumsum(1) > uniform.double().unsqueeze(1)
        last = (p > 0).int().cumsum(1).argmax(1)  # where rounding leaves none
        sampled = torch.where(passed.any(1), passed.int().argmax(1), last)
        slot = torch.where(greedy.squeeze(1), slot, sampled)
    token, after = settle(ids.gather(1, slot.unsqueeze(1)).squeeze(1), finished, bad, stop, pad_id)
    reward = torch.where(considered & ~finished.unsqueeze(1), reward, 0.0)
    return token, slot.masked_fill(bad, -1).masked_fill(finished, 0), reward, after


def considered_of(ids: Tensor, count: Tensor | None) -> Tensor:
    """Of the candidates ids [B, k] the first count [B] of each row, bool [B, k]; none where its count is not 1 to k."""
    k = ids.shape[1]
    if count is None:
        return torch.ones_like(ids, dtype=torch.bool)
    return torch.arange(k, device=ids.device) < count.masked_fill(count > k, 0).unsqueeze(1)


def broken(score: Tensor, logprobs: Tensor, reward: Tensor) -> Tensor:
    """No score to choose by: NaN, +inf, or a finite log-prob and reward whose sum is beyond float32. -inf forbids a token."""
    return ~(score < math.inf) | ((score == -math.inf) & (logprobs > -math.inf) & (reward > -math.inf))


def settle(token: Tensor, finished: Tensor, bad: Tensor, stop: Tensor | None, pad_id: int) -> tuple[Tensor, Tensor]:
    """Chosen tokens [B] with pad_id where a row had finished or has no choice (bad), and which rows are finished now."""
    over = finished | bad
    return token.masked_fill(over, pad_id), over if stop is None else over | is_stop(token.unsqueeze(1), stop).squeeze(1)


def is_stop(ids: Tensor, stop: Tensor) -> Tensor:
    """Which of ids int64 [B, k] are in stop: int64 [E] for all rows, or [B, E], each row's own."""
    return (ids.unsqueeze(-1) == torch.atleast_2d(stop).unsqueeze(1)).any(-1)


OPTIONAL = "stop", "temperature", "uniform", "count"


def tensors_of_choice(batch, reward_weight, finished, stop, temperature, uniform, count) -> dict[str, tuple]:
    """What `check_tensors` is to expect of the arguments of the choice; those in OPTIONAL may be None."""
    each = (batch,)
    of_stop = (batch, None) if isinstance(stop, Tensor) and stop.dim() == 2 else (None,)
    return {
        "reward_weight": (reward_weight, (torch.float32,), each),
        "finished": (finished, (torch.bool,), each),
        "stop": (stop, (torch.int64,), of_stop),
        "temperature": (temperature if isinstance(temperature, Tensor) else None, (torch.float32,), each),
        "uniform": (uniform, (torch.float32,), each),
        "count": (count, (torch.int64,), each),
    }


def check_sampling(temperature: float | Tensor | None, uniform: Tensor | None) -> None:
    """Raises ValueError unless both are given, to sample, or neither."""
    if (temperature is None) != (uniform is None):
        raise ValueError("temperature and uniform belong together: give both to sample, neither for the best score")
    if temperature is not None and not isinstance(temperature, Tensor) and not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}: leave it out for the best score")


def split_temperature(temperature: float | Tensor | None) -> tuple[float | None, Tensor | None]:
    """The temperature as the ops of `torch.ops.pyargs` take it: one number for all rows, or a tensor."""
    return (None, temperature) if isinstance(temperature, Tensor) else (temperature, None)


def one_temperature(temperature: float | None, row_temperature: Tensor | None) -> float | Tensor | None:
    """The inverse of `split_temperature`."""
    if temperature is not None and row_temperature is not None:
        raise ValueError("temperature and row_temperature: give one of them")
    return temperature if row_temperature is None else row_temperature
