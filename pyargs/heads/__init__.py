"""One file per formula that turns a hidden state into a user's reward.

A head has `forward(hidden [..., D], user rows [...]) -> reward [...]` in float32, `fold() -> Folded` (what a decoder reads),
`config() -> dict` (how to build it again) and `users`; where it got a field later, OLDER says what folders without it mean.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyargs import ops

Linear = partial(nn.Linear, dtype=torch.float32)
"""Heads are float32 whatever torch's default dtype is."""


class Folded(NamedTuple):
    """A head in the form that `score_select` takes: its own matrix products, then what is left per candidate.

    features(hidden [B, k, D], user rows [B]) -> [B, k, H]; weight [U or 1, H], bias [U or 1, H] and activation as for
    `score_select`.
    """

    features: Callable[[Tensor, Tensor], Tensor]
    weight: Tensor
    bias: Tensor | None = None
    activation: str = "identity"


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, k, D] times the transpose of weight [H, D], float32 [B, k, H]. On a CPU a row's numbers are the same in any batch;
    those of torch's product depend on how many rows there are. On a GPU it is torch's, as fast as there is one. Not
    differentiable."""
    if x.is_cuda:
        return F.linear(x.to(weight.dtype), weight.detach())
    return ops.user_mlp(x, weight.detach().unsqueeze(0), torch.zeros(len(x), dtype=torch.long, device=x.device))


def apply(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer on x [B, k, D], by `product`."""
    return product(x, layer.weight) + layer.bias
