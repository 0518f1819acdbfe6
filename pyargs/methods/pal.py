"""PAL: users as mixtures of prototypes (arXiv 2406.08469). A: distance to an ideal point; B: cosine to a query.

Differences from PAL's code: B's query is read from the prompt's last token, in training as afterwards (there
position t of the prompt goes with position t of the response in training, and the last token is taken only in use). Past
its end a response keeps its last state (there the states of padding are compared). The optimiser is AdamW (there Adam with
L2). Responses have no end token. Early versions of PAL-A added a penalty on ideal points longer than 4, which later ones
compute and leave out, as here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyargs.config import option
from pyargs.heads import cosine, distance
from pyargs.models.reward_model import RewardModel
from pyargs.training.adapt import fit_users, randn_rows
from pyargs.training.config import AdaptConfig
from pyargs.types import Batch, Features, Users


@dataclass
class Config(AdaptConfig):
    variant: str = option(
        "B",
        "A: ideal point, decodes; B: prompt-conditioned, RM accuracy only (B is what the paper's words point to)",
        choices=["A", "B"],
    )
    rank: int = option(8, "prototypes (A) or prompt projectors (B) (paper: 2 on TLDR, 8 on PRISM and Pref-LaMP)", least=1)
    width: int = option(
        0,
        "P of the projectors D -> P -> P -> P; 0: P = D (PAL's configurations; paper silent), which A needs, since its "
        "projector adds its input to its output",
        least=0,
    )
    weighting: str = option(
        "cumulative",
        "how tokens count, from the first that differs to the longer response's end: in proportion to their "
        "position (PAL's code), all alike, or only the last",
        choices=["cumulative", "mean", "last"],
    )
    projector_lr: float = option(1e-4, "learning rate of the projectors (paper)")
    projector_decay: float = option(0.01, "weight decay of the projectors (paper; AdamW's, where PAL's code has Adam with L2)")
    user_lr: float = option(5e-3, "learning rate of the users' mixtures, in training and for new users (paper)")
    prototype_lr: float = option(5e-3, "learning rate of A's prototypes (PAL's code)")
    scale_lr: float = option(0.1, "learning rate of B's logit scale (PAL's code)")
    adapt_steps: int = option(
        500,
        "full-batch Adam steps for new users (as for the other methods; PAL's code: 20 epochs of AdamW in batches of 4)",
        least=0,
    )


def build(lm, tokenizer, users: list[str], config: Config) -> RewardModel:
    dim = lm.config.get_text_config().hidden_size
    kind = distance if config.variant == "A" else cosine
    mixture = torch.randn(len(users), config.rank, dtype=torch.float32)
    head = kind.Head(dim, config.width or dim, config.rank, Users(users, mixture=mixture))
    form = dict(needs_all_tokens=config.weighting != "last", separate_prompt=config.variant == "B")
    return RewardModel(lm.get_decoder(), tokenizer, head, **form)


def parameter_groups(model: RewardModel, config: Config) -> list[dict]:
    head = model.head
    projectors = [head.project, head.queries] if config.variant == "B" else [head.project]
    own = (
        {"params": [head.logit_scale], "lr": config.scale_lr}
        if config.variant == "B"
        else {"params": [head.prototypes], "lr": config.prototype_lr}
    )
    return [
        {
            "params": [p for part in projectors for p in part.parameters()],
            "lr": config.projector_lr,
            "weight_decay": config.projector_decay,
        },
        {"params": model.users.parameters(), "lr": config.user_lr},
        own,
    ]


def token_weights(batch: Batch, weighting: str) -> Tensor:
    """Weights [N, T] that sum to 1 over the compared positions: from the first differing token to the longer one's end.

    Two states after the same tokens differ by rounding only, so differing tokens show in the states.
    """
    longer = batch.mask.any(1)
    position = torch.arange(longer.shape[1], device=longer.device)
    # In parts: of all new users' pairs at once what is compared would be gigabytes.
    differ = torch.cat([_differ(part) for part in batch.hidden.split(64)]) | (batch.mask[:, 0] != batch.mask[:, 1])
    first = torch.where(differ.any(1), differ.int().argmax(1), longer.sum(1) - 1).unsqueeze(1)
    index = (position - first + 1).clamp(min=0) * longer  # 1, 2, ... from the first differing token
    if weighting == "mean":
        index = (index > 0).int()
    elif weighting == "last":
        index = (index == index.amax(1, keepdim=True)).int()
    return index.float() / index.sum(1, keepdim=True)


def _differ(hidden: Tensor) -> Tensor:
    """Where the states [n, 2, T, D] of two responses differ by more than rounding: bool [n, T]."""
    return (hidden[:, 0] - hidden[:, 1]).abs().amax(-1) > 1e-3 * hidden.abs().amax((1, 2, 3)).unsqueeze(1)


class Tokens(NamedTuple):
    """The M compared positions of a batch: states [M, 2, D] of both responses, the pair of each int64 [M], its weight [M]."""

    states: Tensor
    pair: Tensor
    weight: Tensor


def compared_tokens(batch: Batch, config: Config) -> Tokens:
    """Position t of one response is compared with t of the other; past its end a response keeps its last state."""
    weight = token_weights(batch, config.weighting)
    pair, place = weight.nonzero(as_tuple=True)
    last = batch.mask.sum(-1)[pair] - 1
    sides = torch.arange(2, device=pair.device)
    states = batch.hidden[pair.unsqueeze(1), sides, torch.minimum(place.unsqueeze(1), last)]
    return Tokens(states, pair, weight[pair, place])


def pair_losses(head, projected: Tensor, target: Tensor, tokens: Tokens, config: Config) -> Tensor:
    """Losses [N] of pairs, from f of the tokens' states [M, 2, P] and the target [N, P] that they are compared with."""
    chosen, rejected = head.compare(projected, target[tokens.pair].unsqueeze(1)).unbind(1)
    if config.variant == "A":  # rewards are negative distances: hinge at a margin of 1
        each = F.relu(1 - (chosen - rejected))
    else:  # cross-entropy of the two similarities
        each = -F.logsigmoid(chosen - rejected)
    return each.new_zeros(len(target)).index_add(0, tokens.pair, each * tokens.weight)


def loss(model: RewardModel, batch: Batch, config: Config) -> Tensor:
    head, tokens = model.head, compared_tokens(batch, config)
    prompt = () if batch.prompt is None else (head.project_prompt(batch.prompt),)
    return pair_losses(head, head.project(tokens.states), head.target(batch.user, *prompt), tokens, config).mean()


def projections(head, batch: Batch, config: Config) -> tuple[Tokens, Tensor, tuple[Tensor, ...]]:
    """What does not change while only mixtures are fitted: the compared tokens (without states), f of these, B's g of prompts.

    A query of B lies in the span of its prompt's K projections. In an orthonormal basis of that, and with the length of what
    lies outside of it, f and g have K + 1 numbers instead of P, and the same cosines.
    """
    tokens = compared_tokens(batch, config)
    parts, tokens = tokens.states.split(4096), tokens._replace(states=None)
    if batch.prompt is None:
        return tokens, torch.cat([head.project(part) for part in parts]), ()
    basis, queries = torch.linalg.qr(head.project_prompt(batch.prompt).mT)  # [N, P, K], [N, K, K]
    found = []
    for part, pair in zip(parts, tokens.pair.split(4096), strict=True):
        projected, axes = head.project(part), basis[pair]
        inside = projected @ axes
        found.append(torch.cat([inside, (projected - inside @ axes.mT).norm(dim=-1, keepdim=True)], dim=-1))
    return tokens, torch.cat(found), (F.pad(queries.mT, (0, 1)),)


def adapt(model: RewardModel, support: Features, ids: list[str], config: Config) -> dict[str, Tensor]:
    """Only the mixtures are fitted, so tokens and prompts are projected once."""

    def objective(probe: RewardModel, batch: Batch):
        with torch.no_grad():
            tokens, projected, prompt = projections(probe.head, batch, config)
        return lambda: pair_losses(probe.head, projected, probe.head.target(batch.user, *prompt), tokens, config)

    start = {"mixture": randn_rows(ids, config.rank, seed=config.seed)}
    return fit_users(model, support, ids, start, steps=config.adapt_steps, lr=config.user_lr, objective=objective)
