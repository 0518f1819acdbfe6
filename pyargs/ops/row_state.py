"""What rows of a decoder keep from one step to the next; `score_step` and `tokenwise_step` bring it up to date."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyargs.ops.library import check_tensors
from pyargs.ops.topk_logprobs import MAX_K

CHOSEN = 5
"""Numbers of a choice: token, slot, reward, spread, finished."""
WRITTEN = "finished", "step", "token", "slot", "chosen", "so_far", "total"
"""The fields of a RowState that a step changes."""


class RowState(NamedTuple):
    """Tensors of B rows. A step writes to those marked with *, in place; these must be contiguous.

    reward_weight: [B] float32, the raw w. finished*: [B] bool; a row that has finished keeps its step, so_far and total.
    step*: [B] int64, steps so far. limit: [B] int64, the most; the row finishes there. token*: [B] int64, the chosen one, or
    pad_id. slot*: [B] int64, its place among the candidates; -1 where the row has finished: nothing follows there.
    chosen*: [B, 5] float64, for the reader: token, slot (-1: nothing could be chosen), its reward, the standard deviation of
    the candidates' rewards, and whether the row has finished. stop: [B, E] int64, each row's own, filled up with -1; or [E].

    so_far*: [B] float32, the reward of the text so far, which is that of its stop tokens. total*: [B] float32, the sum of the
    rewards so far; with it the mean over the steps counts in place of each reward, w / (step + 1) times the reward in a score.
    temperature: [B] float32, 0 takes the best score; noise: [B, N] float32, the uniform number of each step, of those behind
    N the last one. Both or neither. own_k: [B] int64, the row's first candidates; top_p, min_p: [B] float64, filters of these
    (see `counts`). All three or none. count: [B] int64, in their place: how many are considered, as for `score_select`.
    """

    reward_weight: Tensor
    finished: Tensor
    step: Tensor
    limit: Tensor
    token: Tensor
    slot: Tensor
    chosen: Tensor
    stop: Tensor
    so_far: Tensor | None = None
    total: Tensor | None = None
    temperature: Tensor | None = None
    noise: Tensor | None = None
    own_k: Tensor | None = None
    top_p: Tensor | None = None
    min_p: Tensor | None = None
    count: Tensor | None = None


def likely(chance: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Which of tokens with these chances float64 [B, K], sorted, pass top_p and min_p [B]. A row without them keeps all,
    however unlikely."""
    top_p, min_p = top_p.unsqueeze(1), min_p.unsqueeze(1)
    total = chance.cumsum(1)  # one after the other: a row's own do not depend on how many candidates others have
    return ((total - chance < top_p * total[:, -1:]) | (top_p >= 1)) & (chance >= min_p * chance[:, :1])


def counts(logprobs: Tensor, own_k: Tensor, top_p: Tensor, min_p: Tensor, gap: Tensor | None = None) -> Tensor:
    """How many candidates each row has, int64 [B]: of its first own_k the likeliest that hold top_p of their probability, and
    of these the ones at least min_p times as likely as the first, whose log-prob is at most `gap` float64 [B] behind.

    logprobs float32 [B, K], sorted, up to a constant of each row. top_p applies after top-k, as in transformers and vLLM.
    """
    own = torch.arange(logprobs.shape[1], device=logprobs.device) < own_k.unsqueeze(1)
    chance = (logprobs - logprobs[:, :1]).double().exp().masked_fill(~own, 0.0)
    kept = own & likely(chance, top_p, min_p)
    if gap is not None:
        exact = logprobs.double()
        kept &= ~(exact[:, :1] - exact > gap.unsqueeze(1))
    kept[:, 0].fill_(True)
    return kept.int().cummin(1).values.sum(1)


def uniform(noise: Tensor, step: Tensor) -> Tensor:
    """The noise [B] of each row's own step."""
    return noise.gather(1, step.clamp(max=noise.shape[1] - 1).unsqueeze(1)).squeeze(1)


def choice_arguments(state: RowState, logprobs: Tensor) -> dict[str, Tensor | None]:
    """What the state is for the ops that choose and keep nothing; logprobs [B, k] of the candidates."""
    count = state.count if state.own_k is None else counts(logprobs, state.own_k, state.top_p, state.min_p)
    return {
        "reward_weight": state.reward_weight if state.total is None else state.reward_weight / (state.step + 1),
        "finished": state.finished,
        "stop": state.stop,
        "temperature": state.temperature,
        "uniform": None if state.noise is None else uniform(state.noise, state.step),
        "count": count,
    }


def reward_at(slot: Tensor, reward: Tensor) -> Tensor:
    """The rewards [B] at these slots, of rewards [B, k]; the first one where nothing could be chosen."""
    return reward.gather(1, slot.clamp(min=0).unsqueeze(1)).squeeze(1)


def spread_of(reward: Tensor, count: Tensor | None = None) -> Tensor:
    """The standard deviation [B] of each row's first `count` rewards; reward [B, k], 0 behind them."""
    several = reward.shape[1] if count is None else count.clamp(min=1).unsqueeze(1)
    # Sums one after the other, rounded once: torch's own depend on how wide the row is.
    square = (reward - _sum(reward) / several).square()
    if count is not None:
        square = square.masked_fill(torch.arange(reward.shape[1], device=reward.device) >= count.unsqueeze(1), 0.0)
    # By a float64 root, since torch's of float32 is off by a last bit on some processors.
    return (_sum(square) / several).double().sqrt().float().squeeze(1)


def _sum(values: Tensor) -> Tensor:
    return values.double().cumsum(1)[:, -1:].float()


def note(state: RowState, token: Tensor, slot: Tensor, reward: Tensor, spread: Tensor, finished: Tensor) -> None:
    """A step in which rows chose this token [B] at this slot [B], with these numbers [B], and ended where finished [B]."""
    on = ~state.finished
    state.step.add_(on)
    finished = finished | (state.step >= state.limit)
    so_far = reward
    if state.total is not None:
        state.total.copy_(torch.where(on, state.total + reward, state.total))
        so_far = state.total / state.step
    if state.so_far is not None:
        state.so_far.copy_(torch.where(on, so_far, state.so_far))
    note_choice(state, token, slot, reward, spread, finished | ~on)


def note_choice(state: RowState, token: Tensor, slot: Tensor, reward: Tensor, spread: Tensor, finished: Tensor) -> None:
    """What stands in the state of a choice; its parameters are those of `note`."""
    state.token.copy_(token)
    state.slot.copy_(slot.masked_fill(finished, -1))
    state.finished.copy_(finished)
    for place, part in enumerate((token, slot, reward, spread, finished)):
        state.chosen[:, place] = part


def note_choice_of(state: RowState, choice: tuple[Tensor, ...], count: Tensor | None) -> None:
    """`note` of what an op that chooses returned: token, slot, reward [B, k] and finished."""
    token, slot, reward, finished = choice
    note(state, token, slot, reward_at(slot, reward), spread_of(reward, count), finished)


def check_state(state: RowState, batch: int, k: int) -> None:
    """Raises an error that names the fix, for k candidates of each of B rows."""
    each, floats, ints = (batch,), (torch.float32,), (torch.int64,)
    stop = (batch, None) if isinstance(state.stop, Tensor) and state.stop.dim() == 2 else (None,)
    expected = {
        "reward_weight": (floats, each),
        "finished": ((torch.bool,), each),
        **dict.fromkeys(("step", "limit", "token", "slot", "own_k", "count"), (ints, each)),
        "chosen": ((torch.float64,), (batch, CHOSEN)),
        "stop": (ints, stop),
        **dict.fromkeys(("so_far", "total", "temperature"), (floats, each)),
        "noise": (floats, (batch, None)),
        **dict.fromkeys(("top_p", "min_p"), ((torch.float64,), each)),
    }
    optional = tuple(RowState._field_defaults)
    check_tensors({name: (getattr(state, name), *what) for name, what in expected.items()}, optional)
    for name in WRITTEN:
        if (value := getattr(state, name)) is not None and not value.is_contiguous():
            raise ValueError(f"{name} is written to and must be contiguous: call .contiguous() where it is made")
    if (state.temperature is None) != (state.noise is None):
        raise ValueError("temperature and noise belong together: give both to sample, neither for the best score")
    if state.noise is not None and state.noise.shape[1] < 1:
        raise ValueError("noise must have a number for at least one step")
    if len({part is None for part in (state.own_k, state.top_p, state.min_p)}) > 1:
        raise ValueError("own_k, top_p and min_p belong together: give all of them or none")
    if state.own_k is not None and state.count is not None:
        raise ValueError("own_k and count: give one of them")
    if k > MAX_K:
        raise ValueError(f"k must be at most {MAX_K}, got {k}")
