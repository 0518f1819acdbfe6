"""One file per formula that turns a hidden state into a user's reward.

A head has `forward(hidden [..., D], user rows [...]) -> reward [...]` in float32, `fold() -> dict` (what a decoder reads),
`config() -> dict` (how to build it again) and `users`. The functions here work on any folded head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyargs.ops.score_select import ACTIVATIONS


def features(folded: dict, hidden: Tensor, user: Tensor) -> Tensor:
    """The matrix products of a folded head: hidden [B, k, D] -> what `score_select` takes as features [B, k, H]."""
    if "project" not in folded:
        return hidden
    x = torch.matmul(hidden.to(folded["project"].dtype), folded["project"].T)
    if "second" not in folded:
        return x
    bias = folded["inner_bias"]
    x = ACTIVATIONS[folded["activation"]](x + (bias if len(bias) == 1 else bias[user]).unsqueeze(1))
    return torch.matmul(x, folded["second"].T)
