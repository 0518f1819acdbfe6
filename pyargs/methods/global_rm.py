"""Global RM: one reward for everyone, the baseline without users (v1: last token; v2: mean over the response's tokens)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pyargs.config import option
from pyargs.heads import linear, mlp
from pyargs.models.reward_model import RewardModel
from pyargs.training.config import HeadConfig
from pyargs.training.losses import bradley_terry
from pyargs.types import Batch, Users


@dataclass
class Config(HeadConfig):
    hidden: int = option(64, "width of the reward MLP, 0: linear (paper silent; 64 as in MPU, its per-user copy)", least=0)
    head_lr: float = option(1e-4, "learning rate of the MLP (paper)")
    pool: str = option(
        "last", "last: v1, the last token's reward; mean: v2, the mean over tokens (paper)", choices=["last", "mean"]
    )
    step_reward: str = option(
        "token",
        "what v2 adds per candidate: its own reward, or the mean so far (paper silent; token fits the ranking)",
        choices=["token", "prefix_mean"],
    )


def build(lm, tokenizer, users: list[str], config: Config) -> RewardModel:
    dim = lm.config.get_text_config().hidden_size
    nobody = Users()
    head = mlp.Head(dim, config.hidden, nobody) if config.hidden else linear.Head(dim, 1, nobody)
    return RewardModel(lm.get_decoder(), tokenizer, head, pool=config.pool, step_reward=config.step_reward)


def loss(model: RewardModel, batch: Batch, config: Config) -> Tensor:
    return bradley_terry(model, batch).mean()
