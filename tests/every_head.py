"""A policy and a reward model with each kind of head, of random numbers, and their answers on the native stack."""

from __future__ import annotations

import functools

import torch
from conftest import tiny_lm

from pyargs.decode import args
from pyargs.decode.backends import cpu
from pyargs.decode.request import check
from pyargs.heads import distance, latent, linear, mlp, user_mlp
from pyargs.lm.tokenize import left_pad
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


def decoded(head: str, rows: list[list[int]], users: list[str], k: int, **more):
    policy, model = models(head)
    ids, mask = left_pad(rows, 0)
    more = dict(reward_weight=2.0, max_new_tokens=6, pad_token_id=0, eos_reward="before", tokenizer=None) | more
    request = check(
        policy,
        model,
        ids,
        mask,
        users,
        num_candidates=k,
        temperature=0.7,
        token_callback=None,
        do_sample=more.get("seed") is not None,
        **({"seed": None, "eos_token_id": [3, 5, 9, 11]} | more),
    )
    assert cpu.possible(policy, model)
    return args.decode(policy, model, request)
