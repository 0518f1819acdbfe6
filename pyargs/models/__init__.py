"""What methods make: one file per kind of artefact, each saved as a folder and loaded by `load_model`."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def load_model(folder: str | Path, *, users: str | Path | None = None, **more):
    """The RewardModel, TokenReward or UserPolicy in a local folder or on the hub; `more` as for its `from_pretrained`.

    users: the folder or hub name of the model's users where they were pushed apart (`push_to_hub(users_repo=)`).
    Raises PyargsError for what is damaged or does not belong together.
    """
    from pyargs.errors import PyargsError
    from pyargs.files import unchanged
    from pyargs.models.folder import locate, read_config

    folder = locate(folder)
    with unchanged(folder):
        kind = read_config(folder)["kind"]  # one of the modules here
        if users is not None:
            if kind == "token_reward":
                raise PyargsError(f"{folder} is the same for everyone: leave users out")
            more["users"] = users
        made = getattr(
            importlib.import_module(f"pyargs.models.{kind}"), "".join(word.capitalize() for word in kind.split("_"))
        )
        return made.from_pretrained(folder, **more)


def forget(model, users: Iterable[str]) -> None:
    """Removes users from a model, with their vectors or demonstrations. A saved folder changes when the model is saved again.

    What all users share stays as it was trained, also on the removed users' pairs. Raises UnknownUser for an unknown id, and
    then removes nobody.
    """
    from pyargs.errors import UnknownUser, did_you_mean
    from pyargs.user_ids import user_ids

    users = list(dict.fromkeys(user_ids(users)))
    for user in users:
        if user not in model.known_users:
            raise UnknownUser(f"there is no user '{user}' to forget." + did_you_mean(str(user), model.known_users))
    if getattr(model, "demonstrations", None) is not None:
        model.demonstrations.remove(users)
    else:
        model.users.remove(users)


def trained_mean(model) -> dict[str, Tensor]:
    """Mean [1, ...] of each kind of vector over the users that the model was trained on: where a new user may begin.

    Users who were adapted later do not count, so that the order in which users are adapted does not matter. In older folders,
    which do not say who was adapted, all count. A folder that was pushed without its users may hold their mean.
    Raises PyargsError where no trained user is left.
    """
    from pyargs.errors import PyargsError

    trained = model.users.trained
    if not trained and model.users.start:
        return {name: model.users.start[name].to(value) for name, value in model.users.vectors.items()}
    if not trained:
        raise PyargsError("no user of the training is left, at whose mean new users begin: take a model that has some")
    return {name: value.detach()[:trained].mean(0, keepdim=True) for name, value in model.users.vectors.items()}
