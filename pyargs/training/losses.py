"""What methods share of their losses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pyargs.errors import PyargsError
from pyargs.models.reward_model import RewardModel
from pyargs.types import Batch


def bradley_terry(model: RewardModel, batch: Batch) -> Tensor:
    """-log sigma(R_u(x, y_w) - R_u(x, y_l)) of each pair, [N]."""
    chosen, rejected = model.rewards(batch).unbind(1)
    return -F.logsigmoid(chosen - rejected)


def check_finite(loss: Tensor, step: int) -> None:
    """Raises PyargsError for a loss that is not a number, at the step that had it."""
    if not torch.isfinite(loss):
        raise PyargsError(f"the loss is {loss.item()} at step {step}: lower the learning rates or look for broken rows")
