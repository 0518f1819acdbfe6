"""A row alone is the row in any company, bit by bit, on the native path."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import tiny_lm
from hypothesis import given, settings
from hypothesis import strategies as st

from pyargs.decode import args
from pyargs.decode.backends import cpu
from pyargs.decode.request import check
from pyargs.heads import distance, latent, linear, mlp, user_mlp
from pyargs.lm.tokenize import left_pad
from pyargs.models.reward_model import RewardModel
from pyargs.ops.library import has_extension
from pyargs.types import Users

pytestmark = pytest.mark.skipif(not has_extension, reason="no extension")

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


@pytest.mark.parametrize("head", HEADS)
def test_rewards_of_a_row_alone_are_those_in_a_batch(head):
    torch.manual_seed(0)
    rows = [torch.randint(0, 61, (n % 7 + 1,)).tolist() for n in range(16)]
    users = [NAMES[n % 3] for n in range(16)]
    together = decoded(head, rows, users, 10)
    for n, (row, user) in enumerate(zip(rows, users, strict=True)):
        same_row(together, n, decoded(head, [row], [user], 10))


def same_row(together, n: int, alone) -> None:
    """Everything but padding behind the longest answer of the batch."""
    for name in ("tokens", "slots", "rewards", "spreads"):
        one, other = getattr(alone, name)[0], getattr(together, name)[n]
        assert torch.equal(one, other[: len(one)]), name
        assert not other[len(one) :].any(), name
    assert alone.lengths[0] == together.lengths[n]


@settings(max_examples=25, deadline=None)
@given(data=st.data(), head=st.sampled_from(sorted(HEADS)), k=st.integers(1, 12), sample=st.booleans())
def test_any_company(data, head, k, sample):
    rows = data.draw(st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=9), min_size=2, max_size=9))
    users = data.draw(st.lists(st.sampled_from(NAMES), min_size=len(rows), max_size=len(rows)))
    seeds = list(range(len(rows))) if sample else None
    together = decoded(head, rows, users, k, seed=seeds)
    n = data.draw(st.integers(0, len(rows) - 1))
    same_row(together, n, decoded(head, rows[n : n + 1], users[n : n + 1], k, seed=seeds and seeds[n : n + 1]))
