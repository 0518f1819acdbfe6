"""tokenwise_step: tokenwise_select, and what a decoder keeps of it for the next step, in one launch."""

from __future__ import annotations

from torch import Tensor
from torch.compiler import is_compiling

from pyargs.ops.library import define
from pyargs.ops.row_state import WRITTEN, RowState, check_state, choice_arguments, note_choice_of
from pyargs.ops.tokenwise_select import check_inputs as check_logits
from pyargs.ops.tokenwise_select import tokenwise_select_reference
from pyargs.ops.topk_logprobs import topk_logprobs_reference


def tokenwise_step_reference(logits: Tensor, reward_logits: Tensor, k: int, state: RowState, *, pad_id: int = 0) -> None:
    """Plain PyTorch form of `tokenwise_step`; same arguments, results and errors."""
    check_inputs(logits, reward_logits, k, state)
    arguments = choice_arguments(state, topk_logprobs_reference(logits, k)[0])
    choice = tokenwise_select_reference(logits, reward_logits, k=k, pad_id=pad_id, **arguments)
    note_choice_of(state, choice, arguments["count"])


def tokenwise_step(logits: Tensor, reward_logits: Tensor, k: int, state: RowState, *, pad_id: int = 0) -> None:
    """`tokenwise_select` with what the rows keep: it reads and writes `state`, so a captured step needs nothing beside.

    Args:
        logits, reward_logits, k, pad_id: as for `tokenwise_select`.
        state: RowState of the B rows, without so_far and total: a stop token has its own reward here. Its fields marked with *
            are brought up to date.

    Errors in the data end a row as in `tokenwise_select`. A row's result does not depend on other rows. Not differentiable.

    Raises:
        TypeError, ValueError: a dtype, shape, device or option that does not fit.
        RuntimeError: what torch refuses to change in place, such as inference tensors outside of inference mode.
    """
    try:
        (_op if is_compiling() else _direct)(logits, reward_logits, k, *state, pad_id)
    except RuntimeError:
        check_inputs(logits, reward_logits, k, state)
        raise


def check_inputs(logits, reward_logits, k, state) -> None:
    """Raises an error that names the fix. The C++ op makes the same checks, with shorter messages."""
    check_logits(logits, reward_logits, state.reward_weight, state.finished, k, state.stop, None, None, state.count)
    check_state(state, len(logits), k)
    if state.so_far is not None or state.total is not None:
        raise ValueError("a stop token has its own reward here: leave out so_far and total")


def _default(
    logits: Tensor,
    reward_logits: Tensor,
    k: int,
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
    pad_id: int = 0,
) -> None:
    state = RowState(
        reward_weight, finished, step, limit, token, slot, chosen, stop, so_far, total, temperature, noise, own_k, top_p,
        min_p, count,
    )  # fmt: skip
    tokenwise_step_reference(logits, reward_logits, k, state, pad_id=pad_id)


def _fake(logits, reward_logits, k, *rest) -> None:
    check_inputs(logits, reward_logits, k, RowState(*rest[: len(RowState._fields)]))


_op, _direct = define("tokenwise_step", _default, _fake, mutates=WRITTEN)
