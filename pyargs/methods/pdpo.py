"""P-DPO: direct preference optimisation of a policy with a soft prompt for each user (arXiv 2402.05133).

Differences from P-DPO's code: new users get vectors of their own from their pairs (there everybody unknown is the
generic user: --adapt-steps 0), the soft prompt stands before the whole prompt (there after its first token, the start token),
soft prompts may begin with the same token twice, and LoRA has the other methods' settings (there dropout 0.05 and more
layers).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyargs.config import option
from pyargs.errors import PyargsError
from pyargs.models.user_policy import SoftPrompt, UserPolicy, random_embeddings
from pyargs.progress import progress_bar
from pyargs.training.adapt import pairs_of_users
from pyargs.training.config import FitConfig
from pyargs.types import LogProbs, Users


@dataclass
class Config(FitConfig):
    soft_tokens: int = option(8, "length of a soft prompt (paper)", least=1)
    clusters: int = option(
        0,
        "0: a soft prompt of each user's own on top of a generic one; C: mixtures of C shared ones, those of the "
        "generic user learned, too (P-DPO)",
        least=0,
    )
    beta: float = option(0.5, "of DPO (P-DPO's code; paper silent)")
    alpha: float = option(0.5, "share of the user's own loss, the rest is the generic user's (P-DPO's code; paper silent)")
    soft_lr: float = option(
        1e-3, "learning rate of soft prompts (P-DPO's code: 5e-5, which hardly moves an embedding in an epoch; paper silent)"
    )
    init: str = option(
        "words",
        "soft prompts begin as embeddings of random tokens, or uniform in (-0.5, 0.5) (both P-DPO's code)",
        choices=["words", "uniform"],
    )
    adapt_lr: float = option(1e-3, "learning rate for new users (the training's; paper silent)")
    adapt_steps: int = option(200, "full-batch Adam steps for new users (paper silent)", least=0)


def build(lm, tokenizer, users: list[str], config: Config) -> UserPolicy:
    dim = lm.get_input_embeddings().weight.shape[1]

    def begin(*shape: int) -> Tensor:
        return random_embeddings(lm, *shape) if config.init == "words" else torch.rand(*shape, dim, dtype=torch.float32) - 0.5

    if config.clusters:
        generic, mixture = torch.randn(config.clusters), torch.randn(len(users), config.clusters, dtype=torch.float32)
        soft = SoftPrompt(begin(config.clusters, config.soft_tokens), Users(users, mixture=mixture), generic)
    else:
        soft = SoftPrompt(begin(1, config.soft_tokens), Users(users, offset=begin(len(users), config.soft_tokens)))
    return UserPolicy(lm, tokenizer, soft=soft)


def warm_start(model: UserPolicy, rows, config: Config) -> None:
    """Log-probs of the train pairs under the reference, which is the model before training and without soft prompts."""
    model.reference = model.untrained(rows).to(model.device)


def finish(model: UserPolicy, config: Config) -> None:
    del model.reference


def parameter_groups(model: UserPolicy, config: Config) -> list[dict]:
    return [{"params": model.soft.parameters(), "lr": config.soft_lr}]


def dpo(logprobs: Tensor, reference: Tensor, beta: float) -> Tensor:
    """-log sigma(beta (m_w - m_l)) of each pair [N], m = log pi - log pi_ref; both arguments [N, 2], summed over tokens."""
    margin = logprobs - reference
    return -F.logsigmoid(beta * (margin[:, 0] - margin[:, 1]))


def loss(model: UserPolicy, batch: LogProbs, config: Config) -> Tensor:
    """Every pair counts twice: for its user and for the generic one."""
    reference = model.reference[batch.pair]
    own, generic = dpo(batch.own, reference, config.beta), dpo(batch.generic, reference, config.beta)
    return (config.alpha * own + (1 - config.alpha) * generic).mean()


class Support(NamedTuple):
    """Support pairs as ids, with the reference's log-probs [N, 2]."""

    encoded: list
    pairs: list
    users: list[str]
    reference: Tensor


def support(model: UserPolicy, rows) -> Support:
    return Support(*model.encode(rows), list(rows["user_id"]), model.untrained(rows))


def adapt(model: UserPolicy, support: Support, ids: list[str], config: Config) -> dict[str, Tensor]:
    """New users' vectors by Adam, all support pairs at every step, from the generic prompt. LoRA and that prompt stay.

    Each user is fitted separately, for the reason that `fit_users` gives.
    """
    with progress_bar(total=len(ids) * config.adapt_steps, desc="adapt", unit="step") as bar:
        found = [
            _adapt_one(model, support, own, user, config, bar)
            for user, own in zip(ids, pairs_of_users(support.users, ids), strict=True)
        ]
    return {name: torch.cat([one[name] for one in found]) for name in found[0]}


def _adapt_one(model: UserPolicy, support: Support, own: Tensor, user: str, config: Config, bar) -> dict[str, Tensor]:
    """The vectors [1, ...] of one user from its pairs, whose numbers are `own`."""
    centres, generic = model.soft.centres.detach(), model.soft.generic
    if config.clusters:  # it begins as the generic user
        users = Users(
            [user],
            mixture=torch.zeros(1, config.clusters, dtype=torch.float32)
            if generic is None
            else generic.detach().cpu().unsqueeze(0),
        )
    else:
        users = Users([user], offset=torch.zeros(1, *centres.shape[1:], dtype=torch.float32))
    users.to(model.device)
    probe = UserPolicy(model.lm, model.tokenizer, soft=SoftPrompt(centres, users)).eval()
    probe.soft.centres.requires_grad_(False)
    probe.lm.requires_grad_(False)
    optimizer = torch.optim.Adam(users.parameters(), lr=config.adapt_lr)
    parts = list(probe.packed_pairs(support.encoded, [support.pairs[i] for i in own.tolist()]))
    reference = support.reference[own].to(model.device)
    with torch.enable_grad():
        for step in range(config.adapt_steps):
            optimizer.zero_grad()
            for take, packed in parts:  # the batch in parts, whose gradients add up
                row = torch.zeros(2 * len(take), dtype=torch.long, device=model.device)
                values = probe.logprobs(packed, row)[0].sum(1).view(-1, 2)
                total = dpo(values, reference[take], config.beta).sum() / len(own)
                if not torch.isfinite(total):
                    raise PyargsError(f"the loss is {total.item()} at step {step}: lower adapt_lr or look for broken rows")
                total.backward()
            optimizer.step()
            bar.update()
    return {name: value.detach() for name, value in users.vectors.items()}
