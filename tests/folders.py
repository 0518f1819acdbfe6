"""Small models of every kind over the backbone of a folder, to be saved and damaged."""

from __future__ import annotations

import torch

from pyargs.heads import linear
from pyargs.lm import lora
from pyargs.lm.loading import fingerprint, load_lm
from pyargs.models.demonstrations import Demonstrations
from pyargs.models.reward_model import RewardModel
from pyargs.models.token_reward import TokenReward
from pyargs.models.user_policy import SoftPrompt, UserPolicy
from pyargs.types import Users


def make(kind: str, folder: str):
    lm, tokenizer = load_lm(folder)
    torch.manual_seed(0)
    decoder, about = lm.get_decoder(), {"method": kind, "fields": {"seed": 0}, "backbone": folder, "dtype": "float32"}
    about |= {"fingerprint": fingerprint(decoder), "max_length": 64}
    users = lambda **vectors: Users(["ann", "bob"], **vectors)  # noqa: E731
    if kind in ("reward", "token"):
        lora.add(decoder, rank=2, alpha=4, rslora=True, target_modules=None)
    if kind == "reward":
        head = linear.Head(32, 3, users(mixture=torch.randn(2, 3)), softmax=True, divisor=10.0)
        return RewardModel(decoder, tokenizer, head, about=about)
    if kind == "token":
        return TokenReward(lm, tokenizer, about=about)
    if kind == "soft":
        return UserPolicy(
            lm, tokenizer, soft=SoftPrompt(torch.randn(1, 2, 32), users(offset=torch.randn(2, 2, 32))), about=about
        )
    shown = {"ann": [{"prompt": "p", "chosen": "c", "rejected": "r"}]}
    demonstrations = Demonstrations(
        shots=1, retrieve="random", show="pair", content_tokens=20, instruction="", max_tokens=60, seed=0, of_user=shown
    )
    return UserPolicy(lm, tokenizer, demonstrations=demonstrations, about=about)


def same(one, other) -> bool:
    """Whether two models hold the same tensors and users."""
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
