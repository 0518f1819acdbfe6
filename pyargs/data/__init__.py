"""Preference data: the schema, reading files, and sets by name. `load` gives a `datasets.Dataset` with the columns

user_id   str
prompt    str, or a list of {"role", "content"} (chat messages)
chosen    str, the response this user prefers
rejected  str
split     "train" and "train_test" for the users to train on; "support" and "query" for the users to adapt to
pair_id   str; the same pair may be shown to several users

and sometimes more (`user_type`, `attribute`). It is TRL's preference format with a user. Sets are built from sources by
`pyargs.prepare`.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING

from pyargs.errors import PyargsError, did_you_mean
from pyargs.files import settle

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "train_test", "support", "query")
HERE = ("demo", "preferences", "synthetic")  # sets that are modules of this folder; published ones are in sets/
COLUMNS = ("user_id", "prompt", "chosen", "rejected", "split", "pair_id")


def names() -> list[str]:
    """The data sets that `load` knows."""
    return sorted([*HERE, *(module.name for module in pkgutil.iter_modules([str(Path(__path__[0], "sets"))]))])


def load(name: str | Path, source: str | Path | None = None, **options) -> Dataset:
    """Preference pairs of a data set (`demo`, `synthetic`, `pref_lamp` ...), of a file or of a built folder.

    `name` is one of `names()` or the path of a JSONL or parquet file or a built set (then read by `preferences`);
    `source` is the file or folder for data that the package does not carry. `options` go to that module's `load`. Raises
    PyargsError: unknown name, missing source, unknown option, or what the data are refused for.
    """
    if name not in names():
        settle(name)
    if name not in names() and Path(name).exists():
        if source is not None:
            raise PyargsError(f"{name} is a file or folder already; leave out the source {source}.")
        name, source = "preferences", name
    if name not in names():
        raise PyargsError(
            f"No data set and no file '{name}'.{did_you_mean(str(name), names())} A set with a builder (`pyargs data list`) "
            f"has to be built first: pyargs data build {name} --source SOURCE --out FOLDER; then give the folder."
        )
    function = importlib.import_module(f"pyargs.data.{'' if name in HERE else 'sets.'}{name}").load
    known = inspect.signature(function).parameters
    wants_source = next(iter(known), None) == "source"
    for option in options:
        if option not in known:
            raise PyargsError(f"Data set '{name}' has no option '{option}'.{did_you_mean(option, known)}")
    if wants_source and source is None:
        raise PyargsError(f"Data set '{name}' needs a source: the path of its file or folder.")
    if not wants_source and source is not None:
        raise PyargsError(f"Data set '{name}' takes no source. For a file of your own, give its path alone.")
    return function(source, **options) if wants_source else function(**options)


def of_split(dataset: Dataset, *splits: str) -> Dataset:
    """The rows of these splits, in order; may be empty."""
    if "split" not in dataset.column_names:
        raise PyargsError(f"the pairs have no column 'split', which is one of {', '.join(SPLITS)} in each row")
    return dataset.select([row for row, split in enumerate(dataset["split"]) if split in splits])


def with_text_ids(dataset: Dataset) -> Dataset:
    """The dataset with integer user ids as their digits (`pyargs.user_ids`), as `load` gives them.

    Raises PyargsError for what is no Dataset, lacks a column that training reads, or has answers that are not text.
    """
    from datasets import Dataset, Value

    if not isinstance(dataset, Dataset):
        raise PyargsError(f"pairs are a datasets.Dataset, as pyargs.load_pairs gives it, not a {type(dataset).__name__}")
    for name in ("user_id", "prompt", "chosen", "rejected"):
        if name not in dataset.column_names:
            raise PyargsError(f"the pairs have no column '{name}'.{did_you_mean(name, dataset.column_names)}")
        if name in ("chosen", "rejected") and len(dataset) and not isinstance(dataset[0][name], str):
            raise PyargsError(f"{name} must be text: lists of messages are read from a file, by pyargs.load_pairs")
    kind = getattr(dataset.features.get("user_id"), "dtype", "")
    return dataset.cast_column("user_id", Value("string")) if kind.startswith(("int", "uint")) else dataset


def content_hash(dataset: Dataset) -> str:
    """SHA-256 over the common columns, row by row in order: the same data have the same hash whatever their source."""
    digest = hashlib.sha256()
    columns = [column for column in COLUMNS if column in dataset.column_names]
    for row in dataset.select_columns(columns):
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
