"""score_step: score_select, and what a decoder keeps of it for the next step, in one launch."""

from __future__ import annotations

from torch import Tensor
from torch.compiler import is_compiling

from pyargs.ops.library import define
from pyargs.ops.row_state import WRITTEN, RowState, check_state, choice_arguments, note_choice_of
from pyargs.ops.score_select import NUMBER, name_of, score_select_reference
from pyargs.ops.score_select import check_inputs as check_scored


def score_step_reference(
    features: Tensor,
    weight: Tensor,
    user: Tensor,
    logprobs: Tensor,
    ids: Tensor,
    state: RowState,
    *,
    bias: Tensor | None = None,
    activation: str = "identity",
    scale: float = 1.0,
    pad_id: int = 0,
    bank: Tensor | None = None,
) -> None:
    """Plain PyTorch form of `score_step`; same arguments, results and errors."""
    check_inputs(features, weight, user, logprobs, ids, state, bias, activation, bank)
    arguments = choice_arguments(state, logprobs)
    choice = score_select_reference(
        features, weight, user, logprobs=logprobs, ids=ids, bias=bias, activation=activation, scale=scale, pad_id=pad_id,
        stop_reward=state.so_far, bank=bank, **arguments,
    )  # fmt: skip
    note_choice_of(state, choice, arguments["count"])


def score_step(
    features: Tensor,
    weight: Tensor,
    user: Tensor,
    logprobs: Tensor,
    ids: Tensor,
    state: RowState,
    *,
    bias: Tensor | None = None,
    activation: str = "identity",
    scale: float = 1.0,
    pad_id: int = 0,
    bank: Tensor | None = None,
) -> None:
    """`score_select` with what the rows keep: it reads and writes `state`, so that a captured step needs nothing beside it.

    Args:
        features, weight, user, logprobs, ids, bias, activation, scale, pad_id, bank: as for `score_select`. k is at most 64;
            logprobs are sorted from high to low where the state has filters.
        state: RowState of the B rows, whose fields marked with * are brought up to date. It stands for `score_select`'s
            reward_weight, finished, stop, stop_reward (so_far), temperature, uniform (noise) and count.

    Errors in the data end a row as in `score_select`. A row's result does not depend on the other rows. Not differentiable.

    Raises:
        TypeError, ValueError: a dtype, shape, device or option that does not fit.
        RuntimeError: what torch refuses to change in place, such as inference tensors outside of inference mode.
    """
    number = NUMBER.get(activation, -1)
    try:
        op = _op if is_compiling() else _direct
        op(features, weight, user, logprobs, ids, *state, bias, number, scale, pad_id, bank)
    except RuntimeError:
        check_inputs(features, weight, user, logprobs, ids, state, bias, activation, bank)
        raise


def check_inputs(features, weight, user, logprobs, ids, state, bias, activation, bank) -> None:
    """Raises an error that names the fix. The C++ op makes the same checks, with shorter messages."""
    check_scored(
        features, weight, user, state.reward_weight, logprobs, ids, state.finished, bias, activation, state.stop,
        state.so_far, None, None, state.count, bank,
    )  # fmt: skip
    check_state(state, *features.shape[:2])


def _default(
    features: Tensor,
    weight: Tensor,
    user: Tensor,
    logprobs: Tensor,
    ids: Tensor,
    reward_weight: Tensor,
    finished: Tensor,
    step: Tensor,
    limit: Tensor,
    token: Tensor,
    slot: Tensor,
    chosen: Tensor,
    stop: Tensor,
    so_far: Tensor | None = None,
    total: Tensor | None = None,
    temperature: Tensor | None = None,
    noise: Tensor | None = None,
    own_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    count: Tensor | None = None,
    bias: Tensor | None = None,
    activation: int = 0,
    scale: float = 1.0,
    pad_id: int = 0,
    bank: Tensor | None = None,
) -> None:
    state = RowState(
        reward_weight, finished, step, limit, token, slot, chosen, stop, so_far, total, temperature, noise, own_k, top_p,
        min_p, count,
    )  # fmt: skip
    score_step_reference(
        features, weight, user, logprobs, ids, state, bias=bias, activation=name_of(activation), scale=scale,
        pad_id=pad_id, bank=bank,
    )  # fmt: skip


def _fake(features, weight, user, logprobs, ids, *rest) -> None:  # without those at the end that are the defaults
    given = dict(zip((*RowState._fields, "bias", "activation", "scale", "pad_id", "bank"), rest, strict=False))
    bias, activation, bank = given.pop("bias", None), given.pop("activation", 0), given.pop("bank", None)
    state = RowState(**{name: value for name, value in given.items() if name in RowState._fields})
    check_inputs(features, weight, user, logprobs, ids, state, bias, name_of(activation), bank)


_op, _direct = define("score_step", _default, _fake, mutates=WRITTEN)
