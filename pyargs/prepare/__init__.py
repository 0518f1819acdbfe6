"""Building sets from their sources. A module with a `Config` is a set that `pyargs data build NAME` makes; the others are what
builders share: folder (what a built set is on disk), check, statistics, mining (hard negatives), simulate (simulated users).
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from pyargs import data
from pyargs.errors import PyargsError, did_you_mean


def names() -> list[str]:
    """The sets that `build` makes."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if hasattr(_module(m.name), "Config"))


def build(name: str, source: str | Path, out: str | Path, settings=None) -> dict:
    """Makes a data set from its source in a folder: parquet files, a card, and dataset.json, which is returned.

    `name` is a module of this folder (`tldr`, `prism`, `pref_lamp`, `preferences`), `source` a local path or "hub", `settings`
    the module's `Config` (default: its defaults). Nothing is written unless everything could be. Raises PyargsError.
    """
    from dataclasses import asdict

    from pyargs.config import check_fields
    from pyargs.lm.embed import embed
    from pyargs.prepare import folder

    settings = config(name)() if settings is None else settings
    check_fields(settings)
    module = _module(name)
    embedder = None if settings.embedder == "none" else settings.embedder
    if embedder is not None:
        embed(embedder, ["."])  # one that cannot be loaded is known now, not when everything else is done
    built = module.build(str(source), settings)
    about = (module.__doc__ or "").strip()
    how = {"source": str(source), **asdict(settings)}
    return folder.write(out, built, title=name, about=about, licence=module.LICENCE, how=how, embedder=embedder)


def config(name: str) -> type:
    """The dataclass of a built set's options. Raises PyargsError for a set that is not built."""
    if name in names():
        return _module(name).Config
    if name in data.names():
        raise PyargsError(f"'{name}' is not built: load it. With a source to build from: {', '.join(names())}.")
    raise PyargsError(f"No set '{name}' to build.{did_you_mean(name, names())}")


def _module(name: str):
    return importlib.import_module(f"pyargs.prepare.{name}")
