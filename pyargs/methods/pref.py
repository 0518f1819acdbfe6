"""PReF: user vectors times shared reward features, initialised by factorising who preferred what (arXiv 2503.06358).

Differences from PReF's code: the features are fitted to the factorisation in one step, as the paper has it (there
by gradient descent through the whole language model), AdamW stands for SGD, and the factorised matrix is another by default
(--votes).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from pyargs.config import option
from pyargs.heads import linear
from pyargs.models import trained_mean
from pyargs.models.reward_model import RewardModel
from pyargs.training.adapt import fit_users, randn_rows
from pyargs.training.config import AdaptConfig
from pyargs.training.losses import bradley_terry
from pyargs.types import Batch, Features, Users


@dataclass
class Config(AdaptConfig):
    rank: int = option(8, "K reward features (paper: 2 on TLDR, 8 on PRISM and Pref-LaMP)", least=1)
    head_lr: float = option(1e-3, "learning rate of features and user vectors (paper)")
    reg: str = option(
        "weight_decay",
        "what the strength 0.02 is of: weight_decay of both (the paper's words), or feature_l2, a penalty on "
        "the difference of a pair's features (PReF's code)",
        choices=["weight_decay", "feature_l2"],
    )
    strength: float = option(0.02, "of the regularisation (paper)")
    init: str = option("svd", "svd: warm start from the factorised preferences (PReF); random", choices=["svd", "random"])
    votes: str = option(
        "signed",
        "what is factorised. signed: +1 where a user prefers the left response, -1 the right one, unknown 0, filled "
        "in at rank K; unit: 1, 0, unknown 0.5, filled in at rank 100 and not centred, as in PReF's code (paper silent). On "
        "planted users of rank 8 signed ranks more pairs right after training: 93 against 88% where 50 users rate each pair, "
        "77 and 74 against 75 and 71% (two seeds) where one does; but it then leaves 93% of the users at 0, who start with "
        "noise",
        choices=["signed", "unit"],
    )
    svd_rounds: int = option(10, "times that missing preferences are filled in with the low-rank ones (PReF's code)", least=0)
    svd_noise: float = option(0.1, "size of the start of users and features that the factorisation leaves at 0 (paper silent)")
    adapt_init: str = option(
        "mean",
        "start of a new user: the mean of the trained users (paper silent), or randn as in PReF's code",
        choices=["mean", "randn"],
    )
    adapt_lr: float = option(1e-2, "learning rate for new users (PReF's code; Adam instead of its SGD; paper silent)")
    adapt_l2: float = option(0.02, "L2 on new users' vectors (the training's; paper silent)")


def build(lm, tokenizer, users: list[str], config: Config) -> RewardModel:
    dim = lm.config.get_text_config().hidden_size
    head = linear.Head(dim, config.rank, Users(users, mixture=torch.randn(len(users), config.rank, dtype=torch.float32)))
    head.directions.data /= dim**0.5
    return RewardModel(lm.get_decoder(), tokenizer, head)


def warm_start(model: RewardModel, rows, config: Config) -> None:
    """Initial Phi and user vectors, from the train pairs under the backbone before training."""
    if config.init == "svd":
        start(model, model.read(rows), config)


def start(model: RewardModel, data: Features, config: Config) -> None:
    """Factorises preferences [P, U] (for config.votes "signed" +1: the user prefers the pair's left response, -1 the right
    one, 0 unknown).

    Which response is left does not depend on the label. U sqrt(S) are then features of the pairs and V sqrt(S) the users.
    Phi is fitted to the features by linear regression on h(left) - h(right), without an intercept: least squares, or, with
    fewer pairs than D or coordinates that nearly depend on each other (condition above 1e10), ridge regression with a
    thousandth of the Gram matrix's mean diagonal as penalty. With little overlap, when nearly every pair has one rater, signed
    votes give exactly 0 to all but the K users with most pairs: these users get noise, with a warning and a note in
    model.about["warm_start"].
    """
    user = model.users.rows(data.users)
    left, right = torch.minimum(data.chosen, data.rejected), torch.maximum(data.chosen, data.rejected)
    pairs, number = torch.stack([left, right], dim=1).unique(dim=0, return_inverse=True)
    signed = config.votes == "signed"
    lowest, unknown, rank = (-1.0, 0.0, config.rank) if signed else (0.0, 0.5, 100)
    vote = torch.where(data.chosen == left, 1.0, lowest).double()
    place = (number, user)
    count = torch.zeros(len(pairs), len(model.users), dtype=torch.float64).index_put_(
        place, torch.ones_like(vote), accumulate=True
    )
    total = torch.zeros_like(count).index_put_(place, vote, accumulate=True)
    known = count > 0
    filled = torch.where(known, total / count.clamp(min=1), unknown)
    for _ in range(config.svd_rounds):
        features, vectors = _factorise(filled, rank)
        filled = torch.where(known, filled, (features @ vectors.T).clamp(lowest, 1))
    features, vectors = _factorise(filled, config.rank)

    zero, dead = vectors.norm(dim=1) < 1e-6, vectors.norm(dim=0) < 1e-6
    model.about["warm_start"] = {
        "pairs": len(pairs),
        "raters_per_pair": known.sum().item() / len(pairs),
        "zero_users": zero.float().mean().item(),
        "empty_features": int(dead.sum()),
    }
    if zero.any():
        warnings.warn(
            f"PReF's warm start leaves {int(zero.sum())} of {len(zero)} users at 0: their pairs ({len(pairs)} with "
            f"{known.sum().item() / len(pairs):.2f} raters each) hardly overlap with others'. They start with noise; "
            "--init random starts all users alike.",
            stacklevel=2,
        )
    # Where user and feature are both 0 neither would ever get a gradient.
    empty = zero.unsqueeze(1) | dead
    vectors = torch.where(empty, config.svd_noise * torch.randn(vectors.shape, dtype=torch.float64), vectors)

    hidden = data.hidden[data.offsets[pairs + 1] - 1].double()
    change = hidden[:, 0] - hidden[:, 1]  # [P, D]
    gram = change.T @ change
    dim = len(gram)
    if len(pairs) < dim or not torch.linalg.cond(gram) < 1e10:
        gram += (1e-3 * gram.trace() / dim + 1e-12) * torch.eye(dim, dtype=torch.float64)
    model.head.directions.data.copy_(torch.linalg.solve(gram, change.T @ features).T)
    model.users.vectors["mixture"].data.copy_(vectors)


def _factorise(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U sqrt(S) [P, rank] and V sqrt(S) [U, rank] of the leading singular vectors, from the small matrix M^T M."""
    square, v = torch.linalg.eigh(matrix.T @ matrix)
    rank_here = min(rank, len(square))
    singular = square.flip(0)[:rank_here].clamp(min=0).sqrt()
    v = v.flip(1)[:, :rank_here]
    root = singular.sqrt()
    u = matrix @ v / torch.where(singular > 1e-9, root, torch.inf)
    pad = (0, rank - rank_here)
    return torch.nn.functional.pad(u, pad), torch.nn.functional.pad(v * root, pad)


def parameter_groups(model: RewardModel, config: Config) -> list[dict]:
    decay = config.strength if config.reg == "weight_decay" else 0.0
    return [{"params": model.head.parameters(), "lr": config.head_lr, "weight_decay": decay}]


def loss(model: RewardModel, batch: Batch, config: Config) -> Tensor:
    value = bradley_terry(model, batch).mean()
    if config.reg == "feature_l2":
        value = value + config.strength * (batch.hidden.diff(dim=1)[:, 0, -1] @ model.head.directions.T).norm(dim=-1).mean()
    return value


def adapt(model: RewardModel, support: Features, ids: list[str], config: Config) -> dict[str, Tensor]:
    if config.adapt_init == "randn":
        initial = randn_rows(ids, config.rank, seed=config.seed)
    else:
        initial = trained_mean(model)["mixture"].repeat(len(ids), 1)
    return fit_users(
        model, support, ids, {"mixture": initial}, steps=config.adapt_steps, lr=config.adapt_lr, weight_decay=config.adapt_l2
    )
