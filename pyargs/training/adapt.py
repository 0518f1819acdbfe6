"""Adaptation: vectors of new users from their support pairs, each user separately."""

from __future__ import annotations

import copy
import hashlib
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from pyargs.config import check_kinds
from pyargs.data import of_split, with_text_ids
from pyargs.errors import PyargsError, described
from pyargs.models.reward_model import RewardModel
from pyargs.training.hooks import method_of
from pyargs.training.losses import bradley_terry, check_finite
from pyargs.types import Batch, Features, Users


def adapt(model, dataset, *, steps: int | None = None, method: str | None = None, again: bool = False) -> list[str]:
    """Adds the users of the rows with split "support" to the model; returns their ids.

    again: adapt known users anew, from these rows alone.
    steps: of the adaptation, the method's by default.
    method: path of the method's .py file, if the model was trained with one.

    Backbone, LoRA and shared head parameters stay as they are; rows of other splits are not looked at, so the query set
    can not reach the result. A method without users needs no adaptation and is left alone. The same model, rows and seed
    give the same result. Raises PyargsError without support rows, and on a known user without `again`.
    """
    ids, vectors = new_vectors(model, dataset, steps=steps, method=method, again=again)
    if vectors is not None:
        model.users.remove([user for user in ids if user in model.users.ids])
        model.users.append(ids, **vectors)
        model.to(model.device)
    return ids


def new_vectors(
    model, dataset, *, steps: int | None = None, method: str | None = None, again: bool = False
) -> tuple[list[str], dict[str, Tensor] | None]:
    """What `adapt` adds, without adding it: the users' ids, and rows [n, ...] of each kind of vector.

    None in the place of rows for a method without users. Arguments and errors as for `adapt`. The model stays as it is;
    demonstrations (ICL), which are no vectors, are added.
    """
    rows = of_split(with_text_ids(dataset), "support")
    if not len(rows):
        raise PyargsError("no rows with split 'support': there is nothing to adapt to")
    ids = list(dict.fromkeys(rows["user_id"]))
    recipe = method_of(model, method)
    misfit = f"the model's fields do not fit the method {model.about.get('method')}"
    with described(misfit):
        made, kinds = model.about["fields"], typing.get_type_hints(recipe.Config)
        if gone := made.keys() - {field.name for field in fields(recipe.Config)}:
            raise PyargsError(
                f"{misfit}: it has no option '{min(gone)}', with which this model was made. A model of another version is not "
                "adapted, train it again"
            )
        check_kinds(made, {name: kinds[name] for name in made}, misfit)
        config = recipe.Config(**made)
    if steps is not None:
        if not hasattr(config, "adapt_steps"):
            raise PyargsError(f"{model.about['method']} takes no steps to adapt: leave adapt_steps out")
        config = replace(config, adapt_steps=steps)
    if recipe.adapt is None:
        return ids, None
    known = [user for user in ids if user in model.known_users]
    if known and not again:
        raise PyargsError(
            f"user '{known[0]}' is there already: adapt it anew (again=True, --again), or give new ids to new users"
        )
    found = []
    # Each user separately, reading of the pairs included: in a batch with others the states would be rounded differently.
    for user, own in zip(ids, pairs_of_users(rows["user_id"], ids), strict=True):
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(config.seed)
            pairs = rows.select(own.tolist())
            support = recipe.support(model, pairs)
            found.append(recipe.adapt(model, support, [user], config))
    return ids, {name: torch.cat([one[name] for one in found]) for name in found[0]}


def losses_of(model: RewardModel, batch: Batch) -> Callable[[], Tensor]:
    """Bradley-Terry of the pairs [N], as a function of the vectors as they are when it is called."""
    return lambda: bradley_terry(model, batch)


def fit_users(
    model: RewardModel,
    support: Features,
    ids: Iterable[str],
    initial: dict[str, Tensor],
    *,
    steps: int,
    lr: float,
    weight_decay: float = 0.0,
    objective: Callable[[RewardModel, Batch], Callable[[], Tensor]] = losses_of,
) -> dict[str, Tensor]:
    """Fits vectors of new users on their support pairs by full-batch Adam, the rest frozen.

    initial: start rows [n, ...] for each kind of vector; weight_decay: L2, as a term of the gradient; objective(model, batch)
    -> a function that gives the loss [N] of each of the user's pairs; their mean is minimised. Each user is fitted in a batch
    of its own: the order of sums depends on the batch, and Adam amplifies differences in the last digit, so that in a common
    batch a user's vector would depend on the others. Raises PyargsError for a user without a pair.
    """
    found = []
    for row, own in enumerate(pairs_of_users(support.users, ids)):
        start = {name: value[row : row + 1] for name, value in initial.items()}
        options = dict(steps=steps, lr=lr, weight_decay=weight_decay, objective=objective)
        found.append(_fit_user(model, support.select(own), start, **options))
    return {name: torch.cat([one[name] for one in found]) for name in initial}


def _fit_user(model: RewardModel, support: Features, initial: dict[str, Tensor], *, steps, lr, weight_decay, objective):
    """The vectors [1, ...] of the one user whose pairs these are."""
    users = Users(support.users[:1], **{name: value.clone() for name, value in initial.items()})
    head = copy.deepcopy(model.head, {id(model.users): users}).requires_grad_(False).eval()  # with this user for its own
    users.requires_grad_(True)
    probe = RewardModel(
        model.backbone, model.tokenizer, head.to(model.device), pool=model.pool, needs_all_tokens=model.needs_all_tokens
    )
    losses = objective(probe, support.batch(users.rows(support.users), last=not model.needs_all_tokens).to(model.device))
    optimizer = torch.optim.Adam(users.parameters(), lr=lr, weight_decay=weight_decay)
    with torch.enable_grad():
        for step in range(steps):
            optimizer.zero_grad()
            loss = losses().mean()
            check_finite(loss, step)
            loss.backward()
            optimizer.step()
    return {name: value.detach() for name, value in users.vectors.items()}


def randn_rows(ids: Iterable[str], *shape: int, seed: int) -> Tensor:
    """Normal start values [n, *shape]; each row depends on the seed and the user's id alone."""
    numbers = [int(hashlib.sha256(f"{seed} {user}".encode()).hexdigest()[:15], 16) for user in ids]
    rngs = [torch.Generator().manual_seed(number) for number in numbers]
    return torch.stack([torch.randn(shape, generator=rng, dtype=torch.float32, device="cpu") for rng in rngs])


def pairs_of_users(users: Sequence[str], ids: Iterable[str]) -> list[Tensor]:
    """For each id the numbers of its pairs, int64 [n]. users: the user of each pair. Raises PyargsError for an id without."""
    numbers: dict[str, list[int]] = {user: [] for user in ids}
    for number, user in enumerate(users):
        numbers[user].append(number)
    for user, own in numbers.items():
        if not own:
            raise PyargsError(f"user '{user}' has no support pair")
    return [torch.tensor(own, device="cpu") for own in numbers.values()]
