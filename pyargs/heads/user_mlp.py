"""An MLP for each user: reward = w_u . relu(W_u h + b_u) (family F4: MPU)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyargs.heads import Folded
from pyargs.types import Users


class Head(nn.Module):
    """`forward(hidden [..., D], user [...]) -> reward [...]` in float32.

    The users' vectors are "first" W [U, H * D], "bias" b [U, H] and "last" w [U, H]; the rows of "first" are flat so that
    gradients can be sparse: a minibatch then touches its own users only. `initial`, the row that all users begin with, is
    kept so that new users begin there too and the users' average means something. No output bias, as in `mlp`.
    """

    def __init__(self, dim: int, hidden: int, users: Users | None = None, ids: list[str] = ()):
        super().__init__()
        self.dim, self.hidden = dim, hidden
        bound = 1 / math.sqrt(dim)  # as nn.Linear does
        self.register_buffer("initial_first", torch.empty(hidden * dim, dtype=torch.float32).uniform_(-bound, bound))
        self.register_buffer("initial_bias", torch.empty(hidden, dtype=torch.float32).uniform_(-bound, bound))
        self.register_buffer(
            "initial_last", torch.empty(hidden, dtype=torch.float32).uniform_(-1 / math.sqrt(hidden), 1 / math.sqrt(hidden))
        )
        self.users = Users(ids, **self.initial(len(ids))) if users is None else users

    def config(self) -> dict:
        return {"dim": self.dim, "hidden": self.hidden}

    def initial(self, count: int) -> dict[str, Tensor]:
        """Start vectors of `count` users."""
        return {name: getattr(self, f"initial_{name}").repeat(count, 1) for name in ("first", "bias", "last")}

    def forward(self, hidden: Tensor, user: Tensor) -> Tensor:
        """Groups rows by user, so that each user's weights, which are larger than the states, are read once."""
        row, states = user.flatten(), hidden.float().reshape(-1, self.dim)
        users, group, count = row.unique(return_inverse=True, return_counts=True)
        order = group.argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[group[order]]
        several = states.new_zeros(len(users), int(count.max()), self.dim)
        several[group, place] = states

        # Sparse gradients let SparseAdam leave the moments of absent users alone. New users are fitted all at once.
        look_up = lambda name: F.embedding(users, self.users.vectors[name], sparse=self.training)  # noqa: E731
        first = look_up("first").view(len(users), self.hidden, self.dim)
        x = torch.baddbmm(look_up("bias").unsqueeze(1), several, first.transpose(1, 2)).relu()
        reward = (x @ look_up("last").unsqueeze(2)).squeeze(2)
        return reward[group, place].view(user.shape)

    @torch.no_grad()
    def fold(self, user: Tensor) -> Folded:
        """`own` of a row is its user's matrix [H, D]."""
        first, bias, last = (self.users.vectors[name][user] for name in ("first", "bias", "last"))
        return Folded(None, last, bias, first.view(len(user), self.hidden, self.dim), "relu")
