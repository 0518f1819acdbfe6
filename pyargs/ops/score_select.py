"""score_select: rewards of the candidates for each row's user, and the choice of the next token."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F

from pyargs.ops.choice import (
    OPTIONAL,
    check_sampling,
    choose,
    is_stop,
    one_temperature,
    split_temperature,
    tensors_of_choice,
)
from pyargs.ops.library import check_tensors, define
from pyargs.ops.user_mlp import FLOATS, user_mlp_reference

ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": F.relu,
    # The exact (erf) form. F.gelu takes +-inf, and in some versions what is merely large, for NaN; relu is its limit.
    "gelu": lambda x: torch.where(x.abs() < 100, F.gelu(x), F.relu(x)),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
}


def score_select_reference(
    features: Tensor,
    weight: Tensor,
    user: Tensor,
    reward_weight: Tensor,
    logprobs: Tensor,
    ids: Tensor,
    finished: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str = "identity",
    scale: float = 1.0,
    stop: Tensor | None = None,
    stop_reward: Tensor | None = None,
    pad_id: int = 0,
    temperature: float | Tensor | None = None,
    uniform: Tensor | None = None,
    count: Tensor | None = None,
    bank: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Plain PyTorch form of `score_select`; same arguments, results and errors."""
    check_inputs(
        features,
        weight,
        user,
        reward_weight,
        logprobs,
        ids,
        finished,
        bias,
        activation,
        stop,
        stop_reward,
        temperature,
        uniform,
        count,
        bank,
    )
    users = max(part.shape[0] for part in (weight, bias, bank) if part is not None)
    bad_user = (user < 0) | (user >= users) if users > 1 else torch.zeros_like(finished)
    row = user.masked_fill(bad_user | finished, 0)

    hidden = features.float() if bank is None else user_mlp_reference(features, bank, row)
    if bias is not None:
        hidden = hidden + bias.float()[row if bias.shape[0] > 1 else row * 0][:, None]
    hidden = ACTIVATIONS[activation](hidden)
    reward = scale * torch.einsum("bkh,bh->bk", hidden, weight.float()[row if weight.shape[0] > 1 else row * 0])
    reward = reward.masked_fill(bad_user[:, None], math.nan)
    if stop_reward is not None:
        reward = torch.where(is_stop(ids, stop) & ~bad_user[:, None], stop_reward[:, None], reward)

    logprobs = logprobs.masked_fill(bad_user[:, None], math.nan)  # no choice, whatever the weight
    return choose(
        logprobs, reward, reward_weight, ids, finished, stop=stop, pad_id=pad_id, temperature=temperature, uniform=uniform,
        count=count,
    )  # fmt: skip


def score_select(
    features: Tensor,
    weight: Tensor,
    user: Tensor,
    reward_weight: Tensor,
    logprobs: Tensor,
    ids: Tensor,
    finished: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str = "identity",
    scale: float = 1.0,
    stop: Tensor | None = None,
    stop_reward: Tensor | None = None,
    pad_id: int = 0,
    temperature: float | Tensor | None = None,
    uniform: Tensor | None = None,
    count: Tensor | None = None,
    bank: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores every candidate for its row's user and chooses one: `logprob + w * reward` (ARGS, arXiv 2402.01694).

    The reward of candidate j in row b is `scale * sum_h weight[u, h] * activation(features[b, j, h] + bias[u, h])`,
    u = user[b]. A `weight` or `bias` of one row is shared by all users. Linear heads have no bias and the identity; an
    MLP comes with its matrix product done before, per-user terms in `bias` and the last layer as `weight`.

    Args:
        features: [B, k, H] float32, bfloat16 or float16; k, H >= 1, B may be 0.
        weight: [W, H], W = number of users or 1. Dtypes may be mixed; sums are float32.
        user: [B] int64, rows of weight and bias. Not read where both are shared.
        reward_weight: [B] float32, the raw w. Where it is 0 the score is the log-probability exactly.
        logprobs, ids: [B, k] float32 and int64, as topk_logprobs gives them.
        finished: [B] bool. Nothing else is read of a finished row; it gets token=pad_id, slot=0, reward=0.
        bias: [U, H], U = number of users or 1.
        activation: "identity", "relu", "gelu" (erf form) or "leaky_relu" (slope 0.2).
        scale: factor of the reward.
        stop: [E] int64, ids that finish a row; or [B, E], each row's own, filled up with -1.
        stop_reward: [B] float32, the reward of candidates in `stop` (a head never saw the state after a terminator).
        pad_id: token of rows that have finished.
        temperature: > 0 samples from softmax(score / temperature) over the candidates; needs `uniform`. A tensor [B] float32
            gives each row its own, where 0 takes the best score.
        uniform: [B] float32 in [0, 1): the slot is the first whose cumulated probability exceeds it.
        count: [B] int64, 1 to k: the row's first candidates, which alone are considered; without it all k are. Nothing is
            read of the others, and their reward is 0.
        bank: [U, H, D], U = number of users or 1: each user's matrix, through which `features`, then [B, k, D], go first, as
            in `user_mlp`. On CUDA what comes out of it is never stored.

    Returns:
        token: [B] int64. slot: [B] int64, index of the choice; equal scores go to the lower slot.
        reward: [B, k] float32. finished: [B] bool.

    Errors in the data do not raise, for a decoding loop on a device cannot: a user row out of range (reward NaN), or a score
    that is NaN, +inf, or beyond float32 (-inf though neither log-prob nor reward is) gives slot=-1, token=pad_id and
    finished=True; so does a count outside of 1 to k (all rewards 0), and a row's temperature that is negative or not finite.
    A score of -inf forbids the candidate. A row's result does not depend on the other rows. With a bank on CUDA a row is
    rounded otherwise where more than 12 candidates are considered, of one 16-bit dtype with the bank: by tensor cores.
    Not differentiable.

    Raises:
        TypeError, ValueError: a dtype, shape, device or option that does not fit.
    """
    number, (heat, row_heat) = NUMBER.get(activation, -1), split_temperature(temperature)
    try:
        return (_op if is_compiling() else _direct)(
            features, weight, user, reward_weight, logprobs, ids, finished, bias, number, scale, stop, stop_reward,
            pad_id, heat, uniform, count, row_heat, bank,
        )  # fmt: skip
    except RuntimeError:
        check_inputs(
            features,
            weight,
            user,
            reward_weight,
            logprobs,
            ids,
            finished,
            bias,
            activation,
            stop,
            stop_reward,
            temperature,
            uniform,
            count,
            bank,
        )
        raise


def check_inputs(
    features,
    weight,
    user,
    reward_weight,
    logprobs,
    ids,
    finished,
    bias,
    activation,
    stop,
    stop_reward,
    temperature,
    uniform,
    count,
    bank,
) -> None:
    """Raises an error that names the fix. The C++ op makes the same checks, with shorter messages."""
    if isinstance(features, Tensor) and features.dim() != 3:
        raise ValueError(f"features must be [B, k, H], got shape {tuple(features.shape)}")
    batch, k, dim = features.shape if isinstance(features, Tensor) else (0, 0, 0)
    hidden = dim
    if bank is not None:
        check_tensors({"features": (features, FLOATS, (batch, k, dim)), "bank": (bank, FLOATS, (None, None, dim))})
        hidden = bank.shape[1]
    expected = {
        "features": (features, FLOATS, (batch, k, dim)),
        "weight": (weight, FLOATS, (None, hidden)),
        "bias": (bias, FLOATS, (None, hidden)),
        "user": (user, (torch.int64,), (batch,)),
        "logprobs": (logprobs, (torch.float32,), (batch, k)),
        "ids": (ids, (torch.int64,), (batch, k)),
        "stop_reward": (stop_reward, (torch.float32,), (batch,)),
    } | tensors_of_choice(batch, reward_weight, finished, stop, temperature, uniform, count)
    check_tensors(expected, optional=("bias", "stop_reward", *OPTIONAL))
    if k < 1 or dim < 1:
        raise ValueError(f"features must have k >= 1 and H >= 1, got shape {tuple(features.shape)}")
    users = [(name, part.shape[0]) for name, part in (("weight", weight), ("bias", bias), ("bank", bank)) if part is not None]
    if hidden < 1 or any(rows < 1 for _, rows in users):
        raise ValueError("weight, bias and bank must have at least one row, and the matrices of a bank too")
    several = [(name, rows) for name, rows in users if rows > 1]
    for name, rows in several[1:]:
        if rows != several[0][1]:
            raise ValueError(f"{several[0][0]} has {several[0][1]} users but {name} {rows}: give all the same, or one row")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    if stop_reward is not None and stop is None:
        raise ValueError("stop_reward needs stop: the ids that get it")
    check_sampling(temperature, uniform)


# What torch.ops.pyargs.score_select takes: all positional, the activation as a number.
_NAMES = tuple(ACTIVATIONS)
NUMBER = {name: number for number, name in enumerate(_NAMES)}


def _default(
    features: Tensor,
    weight: Tensor,
    user: Tensor,
    reward_weight: Tensor,
    logprobs: Tensor,
    ids: Tensor,
    finished: Tensor,
    bias: Tensor | None = None,
    activation: int = 0,
    scale: float = 1.0,
    stop: Tensor | None = None,
    stop_reward: Tensor | None = None,
    pad_id: int = 0,
    temperature: float | None = None,
    uniform: Tensor | None = None,
    count: Tensor | None = None,
    row_temperature: Tensor | None = None,
    bank: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return score_select_reference(
        features, weight, user, reward_weight, logprobs, ids, finished, bias=bias, activation=name_of(activation),
        scale=scale, stop=stop, stop_reward=stop_reward, pad_id=pad_id,
        temperature=one_temperature(temperature, row_temperature), uniform=uniform, count=count,
        bank=bank,
    )  # fmt: skip


def _fake(
    features,
    weight,
    user,
    reward_weight,
    logprobs,
    ids,
    finished,
    bias=None,
    activation=0,
    scale=1.0,
    stop=None,
    stop_reward=None,
    pad_id=0,
    temperature=None,
    uniform=None,
    count=None,
    row_temperature=None,
    bank=None,
):
    check_inputs(
        features,
        weight,
        user,
        reward_weight,
        logprobs,
        ids,
        finished,
        bias,
        name_of(activation),
        stop,
        stop_reward,
        one_temperature(temperature, row_temperature),
        uniform,
        count,
        bank,
    )
    batch, k, _ = features.shape
    token = features.new_empty((batch,), dtype=torch.int64)
    reward = features.new_empty((batch, k), dtype=torch.float32)
    return token, torch.empty_like(token), reward, features.new_empty((batch,), dtype=torch.bool)


def name_of(activation: int) -> str:
    return _NAMES[activation] if 0 <= activation < len(_NAMES) else f"number {activation}"


_op, _direct = define("score_select", _default, _fake)
