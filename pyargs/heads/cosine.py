"""Cosine to a query that depends on user and prompt: reward = s cos(f(h), q), q = sum_j w_uj g_j(h_prompt) (PAL-B)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyargs.errors import PyargsError
from pyargs.heads import Folded
from pyargs.heads.distance import Projector
from pyargs.types import Users


class Head(nn.Module):
    """`forward(hidden [..., D], user [...], prompt [..., D]) -> reward [...]` in float32.

    The users' vector "mixture" [U, K] holds logits over the K prompt projectors; s = min(exp(logit_scale), 100).
    """

    def __init__(self, dim: int, width: int, rank: int, users: Users):
        super().__init__()
        self.project = Projector(dim, width, activation="gelu", residual="none")
        self.queries = nn.ModuleList(Projector(dim, width, activation="gelu", residual="none") for _ in range(rank))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07), dtype=torch.float32))
        self.users = users

    def config(self) -> dict:
        first = self.project.first
        return {"dim": first.in_features, "width": first.out_features, "rank": len(self.queries)}

    def project_prompt(self, prompt: Tensor) -> Tensor:
        """g_1 .. g_K of the prompts' states: [..., K, P]."""
        return torch.stack([query(prompt.float()) for query in self.queries], dim=-2)

    def target(self, user: Tensor, projected_prompt: Tensor) -> Tensor:
        """What f(h) is compared with: q [..., P]."""
        return (self.users.vectors["mixture"][user].softmax(-1).unsqueeze(-1) * projected_prompt).sum(-2)

    def compare(self, projected: Tensor, target: Tensor) -> Tensor:
        return self.logit_scale.exp().clamp(max=100) * F.cosine_similarity(projected, target, dim=-1)

    def forward(self, hidden: Tensor, user: Tensor, prompt: Tensor) -> Tensor:
        return self.compare(self.project(hidden.float()), self.target(user, self.project_prompt(prompt)))

    def fold(self, user: Tensor) -> Folded:
        raise PyargsError("PAL-B ranks whole responses and guides no decoder: use variant A, or Best-of-N")
