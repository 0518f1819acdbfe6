"""Ideal point: reward = -|f(h) - q_u|, where q_u = f(mixture of prototypes) (family F5: PAL-A)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyargs.errors import PyargsError
from pyargs.heads import Folded, Linear, apply, product
from pyargs.types import Users


class Projector(nn.Module):
    """Three linear layers D -> P -> P -> P with an activation after the first two.

    residual "input" adds the input to the output, so that P must be D; "hidden" adds the first layer's output before the
    third; "none" adds nothing. PAL's code has relu and "input" for A, gelu and "none" for B.
    """

    def __init__(self, dim: int, width: int, *, activation: str, residual: str):
        super().__init__()
        if residual not in ("input", "hidden", "none"):
            raise PyargsError(f"a projector's residual is 'input', 'hidden' or 'none', not {residual!r}")
        if residual == "input" and width != dim:
            raise PyargsError(
                f"width={width}: PAL-A's projector adds its input of {dim} numbers to its output, so leave width at 0"
            )
        self.first, self.second, self.third = Linear(dim, width), Linear(width, width), Linear(width, width)
        self.phi, self.residual = {"relu": F.relu, "gelu": F.gelu}[activation], residual

    def forward(self, x: Tensor, apply: Callable[[nn.Linear, Tensor], Tensor] = nn.Module.__call__) -> Tensor:
        one = self.phi(apply(self.first, x))
        two = self.phi(apply(self.second, one))
        y = apply(self.third, two + one if self.residual == "hidden" else two)
        return x + y if self.residual == "input" else y


class Head(nn.Module):
    """`forward(hidden [..., D], user [...]) -> reward [...]` in float32.

    prototypes [K, D], unit rows; the users' vector "mixture" [U, K] holds logits: the ideal point of user u is
    q_u = f(softmax(mixture_u)^T prototypes) [P].
    residual: as in Projector.
    """

    OLDER = {"residual": "hidden"}  # fields that older folders lack

    def __init__(self, dim: int, width: int, rank: int, users: Users, *, residual: str = "input"):
        super().__init__()
        self.project = Projector(dim, width, activation="relu", residual=residual)
        self.prototypes = nn.Parameter(torch.empty(rank, dim, dtype=torch.float32))
        if not self.prototypes.is_meta:  # of a folder, which has its own
            # Seed 42 whatever the seed of the run is, as in PAL's code.
            start = torch.randn(rank, dim, generator=torch.Generator().manual_seed(42), dtype=torch.float32, device="cpu")
            self.prototypes.data = F.normalize(start, dim=1)
        self.users = users

    def config(self) -> dict:
        rank, dim = self.prototypes.shape
        return {"dim": dim, "width": self.project.first.out_features, "rank": rank, "residual": self.project.residual}

    def ideal(self, mixture: Tensor) -> Tensor:
        """q [n, P] of the users with these mixtures [n, K]."""
        return self.project(mixture.softmax(-1) @ self.prototypes)

    def target(self, user: Tensor) -> Tensor:
        """What f(h) is compared with: q_u [..., P]. Training computes q of all users, decoding of these users only."""
        mixture = self.users.vectors["mixture"]
        if self.training:
            return self.ideal(mixture)[user]
        users, place = user.unique(return_inverse=True)
        return self.ideal(mixture[users])[place]

    @staticmethod
    def compare(projected: Tensor, target: Tensor) -> Tensor:
        return -_distance(projected, target)

    def forward(self, hidden: Tensor, user: Tensor) -> Tensor:
        return self.compare(self.project(hidden.float()), self.target(user))

    @torch.no_grad()
    def fold(self, user: Tensor) -> Folded:
        """The distance is the one feature; `score_select` takes it with weight -1. A row's own is its ideal point [1, P]."""
        mixture = self.users.vectors["mixture"][user].softmax(-1).unsqueeze(1)
        ideal = self.project(product(mixture, self.prototypes.T), apply)

        def features(hidden: Tensor, own: Tensor) -> Tensor:
            return _distance(self.project(hidden.float(), apply), own).unsqueeze(-1)

        return Folded(features, -ideal.new_ones(1, 1), own=ideal)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distance over the last dimension; the small term keeps the gradient finite where the points meet."""
    return ((a - b).square().sum(-1) + 1e-12).sqrt()
