"""VPL: a variational encoder infers each user's latent from a few of its pairs; new users need one pass (arXiv 2408.10075).

Differences from VPL's code: contexts are drawn anew at each step from all of the user's other train pairs (there
once, from a pool of 100), the decoder has no output bias, everything but the backbone is float32 (there bfloat16), and the
annealing does not advance during evaluation. Its LoRA (rank 128, dropout 0.1) is the paper's here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyargs.config import option
from pyargs.errors import PyargsError
from pyargs.heads import latent
from pyargs.lm import lora
from pyargs.models.reward_model import RewardModel
from pyargs.training.adapt import pairs_of_users
from pyargs.training.config import HeadConfig
from pyargs.types import Batch, Features, Users


@dataclass
class Config(HeadConfig):
    latent: int = option(512, "Z, the latent's size, and the width of all layers (VPL's code; paper silent)", least=1)
    vae_lr: float = option(1e-4, "learning rate of the encoder (paper)")
    head_lr: float = option(1e-4, "learning rate of score layer and decoder (paper)")
    head_decay: float = option(1e-3, "weight decay of score layer and decoder (paper)")
    kl: float = option(3e-6, "weight of the KL term (VPL's code for four kinds of users; paper silent)")
    kl_period: int = option(
        10_000, "steps in which the KL term rises from a tenth to all of its weight, then again (VPL's code)", least=1
    )
    min_context: int = option(2, "fewest other pairs of the user that the encoder sees in training (VPL's code)", least=1)
    max_context: int = option(
        8, "most of them, and of the pairs in a chunk that a user is inferred from (VPL's code)", least=1
    )
    eval_z: str = option(
        "normalized",
        "a user's latent: the mean scaled to the length sqrt(Z) of all training latents, or mu, the mean as it "
        "is (VPL's code)",
        choices=["normalized", "mu"],
    )
    adapt_pairs: str = option(
        "chunks",
        "chunks: the mean over chunks of at most --max-context pairs; all: one pass over all of them (paper silent)",
        choices=["chunks", "all"],
    )


class Context(NamedTuple):
    """Input of the encoder: states [N, 2, D] of all train pairs under the untrained backbone, and each user's pairs.

    of_user int64 [U, P]: numbers of the pairs, -1 where a user has fewer.
    """

    states: Tensor
    of_user: Tensor


def build(lm, tokenizer, users: list[str], config: Config) -> RewardModel:
    if config.min_context > config.max_context:
        raise PyargsError(f"min_context={config.min_context} is above max_context={config.max_context}")
    dim = lm.config.get_text_config().hidden_size
    latents = torch.zeros(len(users), config.latent, dtype=torch.float32)  # `finish` infers them
    head = latent.Head(dim, config.latent, Users(users, latent=latents), normalized=config.eval_z == "normalized")
    return RewardModel(lm.get_decoder(), tokenizer, head)


def warm_start(model: RewardModel, rows, config: Config) -> None:
    start(model, model.read(rows), config)


def start(model: RewardModel, data: Features, config: Config) -> None:
    """Keeps the train pairs as contexts, beside the model: they are not part of it and not saved."""
    model.context = Context(
        data.last().to(model.device), _pairs_of(model.users.rows(data.users), len(model.users)).to(model.device)
    )


def _pairs_of(user: Tensor, users: int) -> Tensor:
    """Numbers of the pairs of each user, int64 [users, most], filled up with -1."""
    count = torch.bincount(user, minlength=users)
    order = user.argsort(stable=True)
    place = torch.arange(len(user), device="cpu") - (count.cumsum(0) - count)[user[order]]
    found = torch.full((users, int(count.max())), -1, device="cpu")
    found[user[order], place] = order
    return found


def parameter_groups(model: RewardModel, config: Config) -> list[dict]:
    encoder = list(model.head.encoder.parameters())
    skip = {*encoder, *model.users.parameters()}  # users' latents are inferred, not trained
    decoder = [p for p in model.head.parameters() if p not in skip]
    return [
        {"params": encoder, "lr": config.vae_lr},
        {"params": decoder, "lr": config.head_lr, "weight_decay": config.head_decay},
    ]


def draw_context(context: Context, batch: Batch, config: Config) -> tuple[Tensor, Tensor]:
    """States [N, m, 2, D] and mask [N, m] of min..max other pairs of each pair's user, never the pair itself.

    A user with fewer other pairs has all of them as context; a user with a single pair has none.
    """
    candidates = context.of_user[batch.user]  # [N, P]
    usable = (candidates >= 0) & (candidates != batch.pair.to(candidates).unsqueeze(1))
    order = torch.rand(candidates.shape, dtype=torch.float32, device=candidates.device).masked_fill(~usable, 2.0)
    several = min(config.max_context, candidates.shape[1])
    value, chosen = order.topk(several, dim=1, largest=False)
    count = torch.randint(config.min_context, config.max_context + 1, (len(batch), 1), device=candidates.device)
    mask = (value < 2) & (torch.arange(several, device=candidates.device) < count)
    return context.states[candidates.gather(1, chosen).clamp(min=0)], mask


def annealing(step: int, period: int) -> float:
    """From 0.1 to 1 along half a cosine in each period."""
    return 0.1 + 0.9 * (1 - math.cos(math.pi * (step % period) / period)) / 2


def loss(model: RewardModel, batch: Batch, config: Config) -> Tensor:
    """Negative ELBO: Bradley-Terry under a sampled latent, and the annealed KL divergence from the prior N(0, 1)."""
    mean, logvar = model.head.encoder(*draw_context(model.context, batch, config))
    z = latent.unit(mean + (logvar / 2).exp() * torch.randn_like(mean))
    last = (batch.mask.sum(-1) - 1)[..., None, None].expand(-1, -1, 1, batch.hidden.shape[-1])
    hidden = batch.hidden.gather(2, last).squeeze(2)  # [N, 2, D]
    chosen, rejected = model.head.decode(hidden, z.unsqueeze(1).expand(-1, 2, -1)).unbind(1)
    kl = -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(-1)
    return (-F.logsigmoid(chosen - rejected)).mean() + config.kl * annealing(batch.step, config.kl_period) * kl.mean()


@torch.no_grad()
def infer(model: RewardModel, context: Context, config: Config) -> Tensor:
    """The encoder's mean [U, Z] for each user from its pairs."""
    found = []
    for numbers in context.of_user:
        states = context.states[numbers[numbers >= 0]]
        chunks = [states]
        if config.adapt_pairs == "chunks":  # of nearly the same size: none counts for more than it holds
            chunks = states.tensor_split(math.ceil(len(states) / config.max_context))
        means = [
            model.head.encoder(c.unsqueeze(0), torch.ones(1, len(c), dtype=torch.bool, device=c.device))[0] for c in chunks
        ]
        found.append(torch.cat(means).mean(0))
    return torch.stack(found)


def finish(model: RewardModel, config: Config) -> None:
    """The trained users' latents, each from all its train pairs."""
    model.users.vectors["latent"].data.copy_(infer(model, model.context, config))
    del model.context


def support(model: RewardModel, rows) -> Features:
    """The encoder was trained on states of the untrained backbone, so it is given those."""
    with lora.disabled(model.backbone):
        return model.read(rows)


def adapt(model: RewardModel, support: Features, ids: list[str], config: Config) -> dict[str, Tensor]:
    users = Users(ids)
    row = torch.tensor([users.ids[user] for user in support.users], device="cpu")
    pairs_of_users(support.users, ids)  # raises for a user without a pair
    return {
        "latent": infer(model, Context(support.last().to(model.device), _pairs_of(row, len(ids)).to(model.device)), config)
    }
