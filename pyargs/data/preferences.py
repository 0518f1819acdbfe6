"""Preference pairs from any JSON Lines, JSON or parquet file: one row per pair and user.

Columns read: `user_id` (or `user`), `prompt`, `chosen`, `rejected`, `role` or `split`, and, if there, `pair_id`,
`user_type`, `attribute`. `role` wins over `split` ("train", "train_test", "support", "query"; "all" counts as
"train"). Ids may be integers. Texts may be TRL's lists of messages, the prompt by itself or at the beginning of both sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pyargs.data import SPLITS, schema, sources
from pyargs.errors import PyargsError

if TYPE_CHECKING:
    from datasets import Dataset


def load(source: str | Path, *, train_test: float = 0.2, by: str = "prompt", seed: int = 0) -> Dataset:
    """The pairs of a `.jsonl`, `.json` (either with .gz) or `.parquet` file or a built set's folder, in order.

    Columns: `pyargs.data`.

    If no row is "train_test", this share of each train user's prompts is set aside as such (see `carve`). Raises
    PyargsError with file and row: missing column, text that is not a string or empty, chosen == rejected, unknown
    split.
    """
    source = Path(source)
    return schema.to_dataset(
        schema.carve(schema.checked(read(source), where=source.name), train_test=train_test, by=by, seed=seed)
    )


def read(source: str | Path) -> Iterator[tuple[str, dict]]:
    """(place, row) of a file of rows or of the folder of a built set, unchecked; the place names file and row."""
    source = Path(source)
    if not source.is_dir():
        yield from sources.rows(source)
        return
    files = [source / f"{split}.parquet" for split in SPLITS if (source / f"{split}.parquet").is_file()]
    if not files:
        raise PyargsError(f"{source} holds no {SPLITS[0]}.parquet, {SPLITS[2]}.parquet or the like: not a built set.")
    for file in files:
        yield from sources.rows(file)
