"""RM accuracy (eq. 2 of the paper): how often a user's reward of the chosen response is above that of the rejected one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyargs.errors import PyargsError


def rm_accuracy(rewards: Tensor, users: Sequence[str]) -> dict:
    """rewards [N, 2] of chosen and rejected, users N ids -> micro and macro accuracy in percent, tie rate in percent, n.

    The comparison is strict: a tie is an error, and ties are reported. Micro is over pairs, macro the mean over users. `each`
    has a string for each user, "1" for a pair that was right and "0" for one that was not, in the order given.
    Raises PyargsError without pairs or with a reward that is not a number.
    """
    return compare(rewards[:, 0], rewards[:, 1], users)


def compare(chosen: Tensor, rejected: Tensor, users: Sequence[str]) -> dict:
    """Accuracy of any two scores [N]; `rm_accuracy` and `policy_accuracy` are this on different scores."""
    if not len(users):
        raise PyargsError("no pairs to compare: the split is empty")
    if chosen.isnan().any() or rejected.isnan().any():
        raise PyargsError("a score is not a number: the model is broken, its accuracy means nothing")
    correct = (chosen > rejected).double()
    by_user: dict[str, list[float]] = {}
    for user, value in zip(users, correct.tolist(), strict=True):
        by_user.setdefault(user, []).append(value)
    each = {user: "".join(str(int(value)) for value in values) for user, values in by_user.items()}
    return {
        "accuracy": 100 * correct.mean().item(),
        "macro": 100 * torch.tensor([sum(v) / len(v) for v in by_user.values()], dtype=torch.float64).mean().item(),
        "tie_rate": 100 * (chosen == rejected).double().mean().item(),
        "n": len(correct),
        "users": len(by_user),
        "each": each,
    }
