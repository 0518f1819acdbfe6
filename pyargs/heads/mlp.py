"""Shared multi-layer head: reward = w3 . phi(W2 phi(W1 h + c_u)), W2 optional (family F3: Global RM)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyargs.heads import Folded, Linear, product
from pyargs.ops.score_select import ACTIVATIONS
from pyargs.types import Users


class Head(nn.Module):
    """`forward(hidden [..., D], user [...]) -> reward [...]` in float32.

    first [H, D]; bias c: shared [H], or the users' vector "bias" [U, H]; second [H2, H] with its bias, optional;
    last [H]. There is no bias after `last`: under a Bradley-Terry loss its gradient is zero, so it would keep its random
    start value, and the policy score (eqs. 5-6 of the paper) would add that value once per token.
    """

    def __init__(self, dim: int, hidden: int, users: Users, *, activation: str = "relu", second: int = 0):
        super().__init__()
        self.first = Linear(dim, hidden, bias=not users.personal)
        self.second = Linear(hidden, second) if second else None
        self.last = Linear(second or hidden, 1, bias=False)
        self.users = users
        self.activation = activation

    def config(self) -> dict:
        return {
            "dim": self.first.in_features,
            "hidden": self.first.out_features,
            "activation": self.activation,
            "second": self.second.out_features if self.second else 0,
        }

    def forward(self, hidden: Tensor, user: Tensor) -> Tensor:
        phi = ACTIVATIONS[self.activation]
        x = self.first(hidden.float())
        if self.users.personal:
            x = x + self.users.vectors["bias"][user]
        x = phi(x)
        if self.second:
            x = phi(self.second(x))
        return self.last(x).squeeze(-1)

    @torch.no_grad()
    def fold(self, user: Tensor) -> Folded:
        own = self.users.vectors["bias"][user] if self.users.personal else None
        return fold(self.first.weight, own, self.first.bias, self.second, self.last.weight, self.activation)


def fold(
    first: Tensor, own: Tensor | None, shared: Tensor | None, second: nn.Linear | None, last: Tensor, activation: str
) -> Folded:
    """The formula above from its parts: first [H, D], the biases own [B, H] or shared [H], last [1, H or H2]."""
    phi = ACTIVATIONS[activation]

    def through_second(hidden: Tensor, own: Tensor | None) -> Tensor:
        bias = shared if own is None else own.unsqueeze(1)
        return product(phi(product(hidden, first) + bias), second.weight)

    if second is None:
        bias = shared.unsqueeze(0) if own is None else own
        return Folded(lambda hidden, own: product(hidden, first), last, bias, activation=activation)
    return Folded(through_second, last, second.bias.unsqueeze(0), own, activation)
