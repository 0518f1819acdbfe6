"""Pairs of random hidden states that planted users labelled: one family of users for each method that should find them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from pyargs.training import hooks, trainer
from pyargs.types import Features

DIM = 8
SIZE = 4.0  # of a state's coordinates: those of language models are larger than 1 too, and start values are made for that


class Backbone(torch.nn.Module):
    """Stands in for a language model where the hidden states are planted."""

    def __init__(self, dim: int = DIM):
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=dim))

    def get_decoder(self):
        return self


def rewards(family: str, users: int, rng: torch.Generator):
    """(function from states [n, D] and users [n] to planted rewards [n], in units where 1 is a clear preference)."""
    normal = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    linear = lambda heads: lambda h, u: (h * heads[u]).sum(-1)  # noqa: E731
    basis = torch.linalg.qr(normal(DIM, 4)).Q.T  # orthonormal
    if family == "mixtures":  # on the simplex, near its corners
        return linear((3 * normal(users, 4)).softmax(-1) @ basis)
    if family == "low_rank":
        return linear(normal(users, 3) @ basis[:3])
    if family == "prototypes":  # the nearer to one of three points, the better
        points = 3 * torch.nn.functional.normalize(normal(3, DIM), dim=-1)
        ideal = torch.nn.functional.one_hot(torch.arange(users) % 3, 3).float() @ points
        return lambda h, u: -(h - ideal[u]).norm(dim=-1)
    if family == "types":
        return linear(torch.stack([basis[0], -basis[0]])[torch.arange(users) % 2])
    if family == "own":  # nothing in common, and not linear
        first, second = normal(users, DIM) / DIM**0.5, normal(users, DIM) / DIM**0.5
        return lambda h, u: 2 * (h * first[u]).sum(-1) + (h * second[u]).sum(-1).relu()
    raise ValueError(family)


def pairs(family: str, *, seed: int = 3, noise: float = 0.1) -> SimpleNamespace:
    """Features `train`, `unseen` (of train users), `support` and `query` (of new users), and the planted model's accuracies.

    `noise` is the scale of what is added to a planted difference before it becomes a label (logistic, as in Bradley-Terry).
    """
    rng = torch.Generator().manual_seed(seed)
    seen, new = 16, 8
    each, held_out = (500, 100) if family == "own" else (150, 50)
    reward = rewards(family, seen + new, rng)
    user = torch.arange(seen + new).repeat_interleave(each + held_out)
    states = torch.randn(len(user), 2, DIM, generator=rng)
    place = torch.arange(len(user)) % (each + held_out)
    if family == "low_rank":  # all users see the same pairs, each most of them
        states = states[: each + held_out].repeat(seen + new, 1, 1)
    difference = reward(states[:, 0], user) - reward(states[:, 1], user)
    uniform = torch.rand(len(user), generator=rng).clamp(1e-6, 1 - 1e-6)
    first = difference + noise * (uniform.log() - (1 - uniform).log()) > 0
    shown = torch.ones(len(user), dtype=torch.bool)
    if family == "low_rank":
        shown = (torch.rand(len(user), generator=rng) < 0.6) | (place >= each)

    unique = len(states) // (seen + new) if family == "low_rank" else len(states)
    hidden = SIZE * states[:unique].reshape(-1, DIM)
    number = torch.arange(len(user)) % unique
    left, right = 2 * number, 2 * number + 1
    every = Features(
        hidden,
        torch.arange(len(hidden) + 1),
        torch.where(first, left, right),
        torch.where(first, right, left),
        [f"user{u}" for u in user.tolist()],
    )
    part = lambda condition: every.select((condition & shown).nonzero().flatten())  # noqa: E731
    right_share = lambda condition: ((difference > 0) == first)[condition].float().mean().item()  # noqa: E731
    old, early = user < seen, place < each
    return SimpleNamespace(
        train=part(old & early),
        unseen=part(old & ~early),
        support=part(~old & early),
        query=part(~old & ~early),
        best_unseen=right_share(old & ~early),
        best_query=right_share(~old & ~early),
    )


def correct(model, data: Features) -> Tensor:
    """Whether each pair is ranked right, float [N]."""
    with torch.no_grad():
        chosen, rejected = model.rewards(data.batch(model.users.rows(data.users), last=not model.needs_all_tokens)).unbind(1)
    return (chosen > rejected).float()


def ids(data: Features) -> list[str]:
    return list(dict.fromkeys(data.users))


def trained(name: str, data, **fields):
    """A method trained on planted features, as `trainer.train` does it with a frozen backbone."""
    recipe = hooks.method(name)
    config = recipe.Config(seed=1, **fields)
    torch.manual_seed(config.seed)
    model = recipe.build(Backbone(), None, ids(data.train), config)
    if hasattr(recipe, "start"):
        recipe.start(model, data.train, config)
    trainer.train_head(recipe, model, data.train, config)
    recipe.finish(model, config)
    return model.eval(), config


def vectors(name: str, model, data: Features, config) -> dict:
    torch.manual_seed(config.seed)
    return hooks.method(name).adapt(model, data, ids(data), config)
