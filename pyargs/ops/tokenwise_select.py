"""tokenwise_select: from the logits of a policy and of a model whose log-probs are rewards to the next token, at once."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor
from torch.compiler import is_compiling

from pyargs.ops.choice import OPTIONAL, check_sampling, one_temperature, split_temperature, tensors_of_choice
from pyargs.ops.library import check_tensors, define
from pyargs.ops.score_select import FLOATS, score_select_reference
from pyargs.ops.topk_logprobs import MAX_K, topk_logprobs_reference


def tokenwise_select_reference(
    logits: Tensor,
    reward_logits: Tensor,
    reward_weight: Tensor,
    finished: Tensor,
    k: int,
    *,
    stop: Tensor | None = None,
    pad_id: int = 0,
    temperature: float | Tensor | None = None,
    uniform: Tensor | None = None,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Plain PyTorch form of `tokenwise_select`; same arguments, results and errors."""
    check_inputs(logits, reward_logits, reward_weight, finished, k, stop, temperature, uniform, count)
    logprobs, ids, _ = topk_logprobs_reference(logits, k)
    reward = reward_logits.float().log_softmax(1).gather(1, ids)
    return score_select_reference(
        reward.unsqueeze(-1),
        reward.new_ones(1, 1),
        torch.zeros_like(ids[:, 0]),
        reward_weight,
        logprobs,
        ids,
        finished,
        stop=stop,
        pad_id=pad_id,
        temperature=temperature,
        uniform=uniform,
        count=count,
    )


def tokenwise_select(
    logits: Tensor,
    reward_logits: Tensor,
    reward_weight: Tensor,
    finished: Tensor,
    k: int,
    *,
    stop: Tensor | None = None,
    pad_id: int = 0,
    temperature: float | Tensor | None = None,
    uniform: Tensor | None = None,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chooses among the policy's k most probable tokens v: `log pi(v) + w * log pi_r(v)` (GenARM, arXiv 2410.08193).

    Candidates are those of `topk_logprobs`, and the choice that of `score_select`, in one pass over both rows of logits. Both
    log-probs are normalised over all V; the reward of a candidate is `reward_logits[id] - logsumexp(reward_logits)`.

    Args:
        logits: [B, V] of the policy: float32, bfloat16 or float16, any row stride. B may be 0. -inf entries are legal.
        reward_logits: [B, V] of the rewarding model, likewise; the dtypes may differ.
        reward_weight: [B] float32, the raw w. Where it is 0 the score is the log-probability exactly.
        finished: [B] bool. Nothing else is read of a finished row; it gets token=pad_id, slot=0, reward=0.
        k: 1 to 64, at most V.
        stop: [E] int64, ids that finish a row; or [B, E], each row's own, filled up with -1.
        pad_id: token of rows that have finished.
        temperature: > 0 samples from softmax(score / temperature) over the candidates; needs `uniform`. A tensor [B] float32
            gives each row its own, where 0 takes the best score.
        uniform: [B] float32 in [0, 1): the slot is the first whose cumulated probability exceeds it.
        count: [B] int64, 1 to k: of the row's k candidates only the first count are considered; without it all k are. The
            reward of the others is 0.

    Returns:
        token: [B] int64. slot: [B] int64, rank of the choice under the policy; equal scores go to the lower slot.
        reward: [B, k] float32. finished: [B] bool.

    Errors in the data do not raise, for a decoding loop on a device cannot: a score that is NaN, +inf, or beyond float32 (see
    `score_select`), a count outside of 1 to k, and a row's temperature that is negative or not finite give slot=-1,
    token=pad_id and finished=True; a NaN or +inf reward logit makes all scores of its row NaN.
    A score of -inf forbids the candidate. A row's result is bitwise the same in any batch and with any number of threads.
    Not differentiable.

    Raises:
        TypeError, ValueError: a dtype, shape, device or option that does not fit.
    """
    heat, row_heat = split_temperature(temperature)
    try:
        return (_op if is_compiling() else _direct)(
            logits, reward_logits, reward_weight, finished, k, stop, pad_id, heat, uniform, count, row_heat
        )
    except RuntimeError:
        check_inputs(logits, reward_logits, reward_weight, finished, k, stop, temperature, uniform, count)
        raise


def check_inputs(logits, reward_logits, reward_weight, finished, k, stop, temperature, uniform, count) -> None:
    """Raises an error that names the fix. The C++ op makes the same checks, with shorter messages."""
    for name, tensor in {"logits": logits, "reward_logits": reward_logits}.items():
        if isinstance(tensor, Tensor) and tensor.dim() != 2:
            raise ValueError(f"{name} must be [B, V], got shape {tuple(tensor.shape)}: use {name}[:, -1] of [B, T, V]")
    batch, vocab = logits.shape if isinstance(logits, Tensor) else (None, None)
    expected = {
        "logits": (logits, FLOATS, (batch, vocab)),
        "reward_logits": (reward_logits, FLOATS, (batch, None)),
    } | tensors_of_choice(batch, reward_weight, finished, stop, temperature, uniform, count)
    check_tensors(expected, optional=OPTIONAL)
    if reward_logits.shape[1] != vocab:
        raise ValueError(
            f"logits have {vocab} entries a row but reward_logits {reward_logits.shape[1]}: "
            "cut both to the tokens they share, [:, :V]"
        )
    if isinstance(k, bool) or not isinstance(k, Integral | torch.SymInt):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if not 1 <= k <= MAX_K:
        raise ValueError(f"k must be 1 to {MAX_K}, got {k}")
    if k > vocab:
        raise ValueError(f"k is {k} but logits have only {vocab} entries a row: lower k")
    check_sampling(temperature, uniform)


def _default(
    logits: Tensor,
    reward_logits: Tensor,
    reward_weight: Tensor,
    finished: Tensor,
    k: int,
    stop: Tensor | None = None,
    pad_id: int = 0,
    temperature: float | None = None,
    uniform: Tensor | None = None,
    count: Tensor | None = None,
    row_temperature: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tokenwise_select_reference(
        logits, reward_logits, reward_weight, finished, k, stop=stop, pad_id=pad_id,
        temperature=one_temperature(temperature, row_temperature), uniform=uniform, count=count,
    )  # fmt: skip


def _fake(
    logits,
    reward_logits,
    reward_weight,
    finished,
    k,
    stop=None,
    pad_id=0,
    temperature=None,
    uniform=None,
    count=None,
    row_temperature=None,
):
    temperature = one_temperature(temperature, row_temperature)
    check_inputs(logits, reward_logits, reward_weight, finished, k, stop, temperature, uniform, count)
    batch = logits.shape[0]
    token = logits.new_empty((batch,), dtype=torch.int64)
    reward = logits.new_empty((batch, k), dtype=torch.float32)
    return token, torch.empty_like(token), reward, logits.new_empty((batch,), dtype=torch.bool)


_op, _direct = define("tokenwise_select", _default, _fake)
