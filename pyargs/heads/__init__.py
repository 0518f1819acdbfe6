"""One file per formula that turns a hidden state into a user's reward.

A head has `forward(hidden [..., D], user rows [...]) -> reward [...]` in float32; `fold(user rows [B]) -> Folded`, what a
decoder reads, at a cost that depends on these rows alone; `config() -> dict`, the arguments to build it again; and `users`.
`OLDER` has the values of fields that older folders lack.
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
    """A head for the users of B rows: `features` has its matrix products, the rest is what `score_select` computes.

    features(hidden [B, k, D], own) -> [B, k, H]; own [B, ...] or None: what features needs of each row's user. Where features
    is None, own [B, H, D] is the bank of `score_select`, whose features are then the hidden states.
    weight [B or 1, H], bias [B or 1, H] and activation are as for `score_select`, whose `user` is then arange(B).
    A row's parts are copies: they do not change with the table of users, and depend on no other row.
    """

    features: Callable[[Tensor, Tensor | None], Tensor] | None
    weight: Tensor
    bias: Tensor | None = None
    own: Tensor | None = None
    activation: str = "identity"

    def scored(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """The features and the bank of `score_select` for hidden states [B, k, D]."""
        return (hidden, self.own) if self.features is None else (self.features(hidden, self.own), None)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, k, D] times the transpose of weight [H, D], float32 [B, k, H]. On a CPU a row's numbers are the same in any batch,
    unlike those of torch's product. On a GPU it is torch's product, which is faster. Not differentiable."""
    if x.is_cuda:
        return F.linear(x.to(weight.dtype), weight.detach())
    return ops.user_mlp(x, weight.detach().unsqueeze(0), torch.zeros(len(x), dtype=torch.long, device=x.device))


def apply(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer on x [B, k, D], by `product`."""
    if x.is_cuda:
        return F.linear(x.to(layer.weight.dtype), layer.weight.detach(), layer.bias.detach())
    return product(x, layer.weight) + layer.bias
