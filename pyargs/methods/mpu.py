"""MPU: a baseline of the paper with an MLP of each user's own; MPU-Avg averages its reward over the tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pyargs.config import option
from pyargs.heads import user_mlp
from pyargs.models import trained_mean
from pyargs.models.reward_model import RewardModel
from pyargs.training.adapt import fit_users
from pyargs.training.config import AdaptConfig
from pyargs.training.losses import bradley_terry
from pyargs.types import Batch, Features


@dataclass
class Config(AdaptConfig):
    hidden: int = option(64, "width of each user's MLP (paper silent; 64 is 37k to 131k parameters a user)", least=1)
    head_lr: float = option(1e-3, "learning rate of the MLPs (paper)")
    pool: str = option(
        "last",
        "last: MPU; mean: MPU-Avg, the mean over tokens as in Global v2 (inferred from the paper's appendix F); "
        "hidden: the reward of the tokens' mean state",
        choices=["last", "mean", "hidden"],
    )
    step_reward: str = option(
        "token",
        "what MPU-Avg adds per candidate: its own reward, or the mean so far (paper silent)",
        choices=["token", "prefix_mean"],
    )
    adapt_init: str = option(
        "initial",
        "where a new user's MLP begins: where all began, or at the mean of the trained ones (paper silent)",
        choices=["initial", "mean"],
    )
    adapt_lr: float = option(1e-3, "learning rate for new users (the training's; paper silent)")
    adapt_l2: float = option(0.01, "L2 on new users' MLPs: 14 to 100 pairs against 37k parameters and more (paper silent)")


def build(lm, tokenizer, users: list[str], config: Config) -> RewardModel:
    head = user_mlp.Head(lm.config.get_text_config().hidden_size, config.hidden, ids=users)
    return RewardModel(lm.get_decoder(), tokenizer, head, pool=config.pool, step_reward=config.step_reward)


def parameter_groups(model: RewardModel, config: Config) -> list[dict]:
    return [{"params": model.users.parameters(), "lr": config.head_lr, "sparse": True}]


def loss(model: RewardModel, batch: Batch, config: Config) -> Tensor:
    return bradley_terry(model, batch).mean()


def adapt(model: RewardModel, support: Features, ids: list[str], config: Config) -> dict[str, Tensor]:
    if config.adapt_init == "mean":
        initial = {name: value.repeat(len(ids), 1) for name, value in trained_mean(model).items()}
    else:
        initial = model.head.initial(len(ids))
    return fit_users(model, support, ids, initial, steps=config.adapt_steps, lr=config.adapt_lr, weight_decay=config.adapt_l2)
