"""LoRE: each user's reward is a convex mixture of K shared directions (arXiv 2504.14439); LoRE-Alt alternates the updates.

Differences from LoRE's code: no term pulls the directions towards V_sft, the head of a pretrained reward model (there LoRE-Alt
has it, and LoRE with weight 0), since a language model has no such head; the paper leaves it out for that reason. Every pair
has the same weight (there, in LoRE, every user), training uses minibatches instead of all data, and no direction is dropped
(there LoRE-Alt drops those to which no user gives a hundredth).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyargs.config import option
from pyargs.heads import linear
from pyargs.models.reward_model import RewardModel
from pyargs.training.adapt import fit_users, randn_rows
from pyargs.training.config import AdaptConfig
from pyargs.training.losses import bradley_terry
from pyargs.types import Batch, Features, Users


@dataclass
class Config(AdaptConfig):
    rank: int = option(8, "K directions (paper: 2 on TLDR, 8 on PRISM and Pref-LaMP; LoRE-Alt: 20)", least=1)
    head_lr: float = option(0.5, "learning rate of directions and mixtures (paper)")
    pool: str = option(
        "last",
        "last: the last token's reward (paper); mean: the mean over tokens, as Global v2",
        choices=["last", "mean"],
    )
    divisor: float = option(100.0, "rewards are divided by it (LoRE's code; paper silent)")
    alternate: bool = option(
        False,
        "LoRE-Alt: mixtures first, then directions and backbone, for every minibatch (paper); without LoRE's "
        "regularisation towards the head of a pretrained reward model, which a language model does not have (paper)",
    )
    adapt_lr: float = option(0.1, "learning rate for new users (LoRE's code on TLDR, on PRISM 0.5; paper silent)")
    adapt_init: str = option(
        "zeros",
        "start of a new user's mixture: zeros is uniform and adds no seed effect; randn as in LoRE's code",
        choices=["zeros", "randn"],
    )


def build(lm, tokenizer, users: list[str], config: Config) -> RewardModel:
    dim = lm.config.get_text_config().hidden_size
    mixture = torch.randn(len(users), config.rank, dtype=torch.float32)
    head = linear.Head(dim, config.rank, Users(users, mixture=mixture), softmax=True, divisor=config.divisor)
    return RewardModel(lm.get_decoder(), tokenizer, head, pool=config.pool)


def loss(model: RewardModel, batch: Batch, config: Config) -> Tensor:
    return bradley_terry(model, batch).mean()


def turns(model: RewardModel, config: Config) -> list[set]:
    """LoRE-Alt: the mixtures, then everything else, each with a forward pass of its own."""
    everything = {p for p in model.parameters() if p.requires_grad}
    mixtures = set(model.users.parameters())
    return [mixtures, everything - mixtures] if config.alternate else [everything]


def adapt(model: RewardModel, support: Features, ids: list[str], config: Config) -> dict[str, Tensor]:
    rank = len(model.head.directions)
    start = (
        randn_rows(ids, rank, seed=config.seed)
        if config.adapt_init == "randn"
        else torch.zeros(len(ids), rank, dtype=torch.float32)
    )
    return fit_users(model, support, ids, {"mixture": start}, steps=config.adapt_steps, lr=config.adapt_lr)
