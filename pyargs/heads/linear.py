"""Linear head: reward = <a_u, h> / divisor, where a_u mixes shared directions (families F1 and F2 of LoRE and PReF)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyargs.heads import Folded, product
from pyargs.types import Users


class Head(nn.Module):
    """`forward(hidden [..., D], user [...]) -> reward [...]` in float32.

    directions V [K, D]; users' vector "mixture" [U, K]. With softmax the user's weights are softmax(mixture), a convex
    combination; without, the mixture itself. With `users` that hold no vectors, K must be 1: one direction for everyone.
    There is no bias: it has no gradient under a Bradley-Terry loss, yet it would enter the policy score once per token.
    """

    def __init__(self, dim: int, rank: int, users: Users, *, softmax: bool = False, divisor: float = 1.0):
        super().__init__()
        if not users.personal and rank != 1:
            raise ValueError(f"{rank} directions but no user vectors to mix them: give the users 'mixture'")
        self.directions = nn.Parameter(torch.randn(rank, dim, dtype=torch.float32))
        self.users = users
        self.softmax, self.divisor = softmax, divisor

    def config(self) -> dict:
        rank, dim = self.directions.shape
        return {"dim": dim, "rank": rank, "softmax": self.softmax, "divisor": self.divisor}

    def weights(self, user: Tensor) -> Tensor:
        """Weights [..., K] of the directions for each user row [...]."""
        if not self.users.personal:
            return self.directions.new_ones(*user.shape, 1)
        mixture = self.users.vectors["mixture"][user]
        return mixture.softmax(-1) if self.softmax else mixture

    def forward(self, hidden: Tensor, user: Tensor) -> Tensor:
        return ((hidden.float() @ self.directions.T) * self.weights(user)).sum(-1) / self.divisor

    @torch.no_grad()
    def fold(self, user: Tensor) -> Folded:
        """Each row's own direction [B, D], the divisor included; the one direction [1, D] where users hold no vectors."""
        weights = self.weights(user if self.users.personal else user.new_zeros(1))
        directions = product(weights.unsqueeze(1), self.directions.T).squeeze(1)
        return Folded(lambda hidden, own: hidden, directions / self.divisor)
