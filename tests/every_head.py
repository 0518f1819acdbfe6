"""A policy and a reward model with each kind of head, of random numbers, and their answers on the CPU stack."""

from __future__ import annotations

import functools

import torch
from conftest import tiny_lm

from pyargs.decode.engine import Engine
from pyargs.heads import distance, latent, linear, mlp, user_mlp
from pyargs.models.reward_model import RewardModel
from pyargs.types import Users

NAMES = ["ann", "bob", "cid"]
DIM = 32
HEADS = {
    "linear": lambda: linear.Head(DIM, 5, Users(NAMES, mixture=torch.randn(3, 5)), softmax=True),
    "mlp": lambda: mlp.Head(DIM, 37, Users()),
    "mlp of users": lambda: mlp.Head(DIM, 37, Users(NAMES, bias=torch.randn(3, 37)), activation="gelu", second=19),
    "user_mlp": lambda: user_mlp.Head(DIM, 21, ids=NAMES),
    "distance": lambda: distance.Head(DIM, 45, 3, Users(NAMES, mixture=torch.randn(3, 3)), residual="hidden"),
    "distance to the input": lambda: distance.Head(DIM, DIM, 3, Users(NAMES, mixture=torch.randn(3, 3)), residual="input"),
    "latent": lambda: latent.Head(DIM, 23, Users(NAMES, latent=torch.randn(3, 23))),
}


@functools.cache
def models(head: str):
    policy = tiny_lm(dtype=torch.float32)
    torch.manual_seed(5)
    return policy, RewardModel(tiny_lm(dtype=torch.float32, seed=1).get_decoder(), None, HEADS[head]()).eval()


def decoded(head: str, rows: list[list[int]], users: list[str], k: int, backend="cpu", **more):
    """Answers of all rows at once."""
    wish = dict(reward_weight=2.0, max_new_tokens=6, num_candidates=k, stop=[3, 5, 9, 11], seed=0) | more
    return Engine(*models(head), backend=backend, max_rows=len(rows)).generate(rows, users, **wish)
