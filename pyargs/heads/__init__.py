"""One file per formula that turns a hidden state into a user's reward.

A head has `forward(hidden [..., D], user rows [...]) -> reward [...]` in float32, `fold() -> Folded` (what a decoder reads),
`config() -> dict` (how to build it again) and `users`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Folded(NamedTuple):
    """A head in the form that `score_select` takes: its own matrix products, then what is left per candidate.

    features(hidden [B, k, D], user rows [B]) -> [B, k, H]; weight [U or 1, H], bias [U or 1, H] and activation as for
    `score_select`.
    """

    features: Callable[[Tensor, Tensor], Tensor]
    weight: Tensor
    bias: Tensor | None = None
    activation: str = "identity"
