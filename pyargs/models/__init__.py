"""What methods make: one file per kind of artefact, each saved as a folder and loaded by `load_model`."""

from __future__ import annotations

import importlib
from pathlib import Path


def load_model(folder: str | Path, **more):
    """The RewardModel, TokenReward or UserPolicy in a local folder or on the hub; `more` as for its `from_pretrained`."""
    from pyargs.files import unchanged
    from pyargs.models.folder import locate, read_config

    folder = locate(folder)
    with unchanged(folder):
        kind = read_config(folder)["kind"]  # one of the modules here
        made = getattr(
            importlib.import_module(f"pyargs.models.{kind}"), "".join(word.capitalize() for word in kind.split("_"))
        )
        return made.from_pretrained(folder, **more)
