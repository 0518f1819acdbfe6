"""GenARM: an autoregressive reward model, whose log-probs are the rewards of all next tokens (arXiv 2410.08193). No users.

LoRA has the other methods' settings, where GenARM's code has dropout 0.05, weight decay 0.05 and 100 steps of warm-up.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from pyargs.config import option
from pyargs.models.token_reward import TokenReward
from pyargs.training.config import FitConfig
from pyargs.types import LogProbs


@dataclass
class Config(FitConfig):
    beta: float = option(0.05, "scale of the log-probs in the loss (GenARM's code; paper silent)")
    gamma: float = option(0.0, "margin (GenARM's code)")
    lora_lr: float = option(5e-4, "learning rate of LoRA (GenARM's code; this paper has 5e-5 for all models)")


def build(lm, tokenizer, users: list[str], config: Config) -> TokenReward:
    return TokenReward(lm, tokenizer)


def loss(model: TokenReward, batch: LogProbs, config: Config) -> Tensor:
    """Sums over the tokens, without a reference and without dividing by the length."""
    chosen, rejected = batch.own.unbind(1)
    return -F.logsigmoid(config.beta * (chosen - rejected) - config.gamma).mean()
