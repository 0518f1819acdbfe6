"""Preference pairs from any JSON Lines or parquet file: one row per pair and user.

Columns read: `user_id` (or `user`), `prompt`, `chosen`, `rejected`, `role` or `split`, and, if there, `pair_id`,
`user_type`, `attribute`. `role` wins over `split` ("train", "train_test", "support", "query"; "all" counts as
"train").
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pyargs.data import COLUMNS, SPLITS
from pyargs.errors import PyargsError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

OPTIONAL = ("user_type", "attribute")


def load(source: str | Path, *, train_test: float = 0.2, by: str = "prompt", seed: int = 0) -> Dataset:
    """The pairs of a `.jsonl`, `.jsonl.gz` or `.parquet` file, in file order; columns as in `pyargs.data`.

    If no row is "train_test", this share of each train user's prompts is set aside as such (see `carve`). Raises
    PyargsError with file and row: missing column, text that is not a string or empty, chosen == rejected, unknown
    split.
    """
    source = Path(source)
    return to_dataset(carve(check(read(source), where=source.name), train_test=train_test, by=by, seed=seed))


def read(source: Path) -> list[dict]:
    """The rows of a file as dictionaries, unchecked."""
    if not source.is_file():
        raise PyargsError(f"No file {source}.")
    suffixes = source.suffixes[-2:] if source.suffix == ".gz" else source.suffixes[-1:]
    if suffixes == [".parquet"]:
        import pyarrow.parquet

        return pyarrow.parquet.read_table(source).to_pylist()
    if suffixes not in ([".jsonl"], [".jsonl", ".gz"]):
        raise PyargsError(f"{source.name}: a preference file is .jsonl, .jsonl.gz or .parquet.")
    rows = []
    try:
        with gzip.open(source, "rt", encoding="utf-8") if source.suffix == ".gz" else open(source, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append(json.loads(line))
                    if not isinstance(rows[-1], dict):
                        raise PyargsError(f"{source.name}, line {number}: not a JSON object.")
    except json.JSONDecodeError as error:
        raise PyargsError(f"{source.name}, line {number}: not JSON ({error.msg}).") from None
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise PyargsError(f"{source.name} is damaged or not what its name says: {error}") from None
    return rows


def check(rows: Iterable[dict], *, where: str = "rows") -> list[dict]:
    """Rows with the common columns, checked; nothing is repaired or dropped. `where` names the origin in messages."""
    checked: list[dict] = []
    kinds: dict[str, tuple[str, int]] = {}
    for number, row in enumerate(rows, 1):
        place = f"{where}, row {number}"
        split = _column(row, place, "role", "split", nullable=True)
        if split == "adapt":
            raise PyargsError(f"{place}: a row of an adapt user needs a column 'role', 'support' or 'query'.")
        split = "train" if split == "all" else split
        if split not in SPLITS:
            raise PyargsError(f"{place}: unknown split '{split}'; known: all, {', '.join(SPLITS)}.")
        user = _column(row, place, "user_id", "user")
        out = {
            "user_id": _text(user, place, "user_id"),
            "prompt": _prompt(_column(row, place, "prompt"), place),
            "chosen": _response(_column(row, place, "chosen"), place, "chosen"),
            "rejected": _response(_column(row, place, "rejected"), place, "rejected"),
            "split": split,
        }
        if out["chosen"] == out["rejected"]:
            raise PyargsError(f"{place}: chosen and rejected are the same text.")
        pair_id = row.get("pair_id")
        out["pair_id"] = _pair_id(out) if pair_id is None else _text(pair_id, place, "pair_id")
        out |= {name: None if row[name] is None else str(row[name]) for name in OPTIONAL if name in row}
        kind = "train" if split in ("train", "train_test") else "adapt"
        first_kind, first = kinds.setdefault(out["user_id"], (kind, number))
        if kind != first_kind:
            raise PyargsError(
                f"{place}: user '{out['user_id']}' is of the {kind} users here, of the {first_kind} users in row {first}. "
                "A user is either trained on (train, train_test) or adapted to (support, query)."
            )
        if checked and isinstance(checked[0]["prompt"], str) != isinstance(out["prompt"], str):
            raise PyargsError(f"{place}: prompts must be all strings or all lists of messages; row 1 is the other kind.")
        checked.append(out)
    if not checked:
        raise PyargsError(f"{where}: no rows.")
    return checked


def carve(rows: list[dict], *, train_test: float = 0.2, by: str = "prompt", seed: int = 0) -> list[dict]:
    """Sets `split` to "train_test" for this share of each train user's prompts, unless a row has it already.

    Whole prompts are set aside (`by="prompt"`), so that no prompt of a user is in both; `by="pair"` is for files
    where a few prompts serve all pairs. Prompts are ordered by a seeded hash, the same for all users: the outcome
    does not depend on the order of rows, and a prompt that users share falls on the same side for most of them. The
    count is rounded to the nearest; at least one prompt stays in train.
    """
    if not 0 <= train_test < 1:
        raise PyargsError(f"train_test is a share from 0 to below 1, not {train_test}.")
    if by not in ("prompt", "pair"):
        raise PyargsError(f"by is 'prompt' or 'pair', not '{by}'.")
    if train_test == 0 or any(row["split"] == "train_test" for row in rows):
        return rows

    def key(row: dict) -> str:
        what = row["pair_id"] if by == "pair" else json.dumps(row["prompt"], sort_keys=True)
        return hashlib.sha256(f"{seed}\0{what}".encode()).hexdigest()

    keys: dict[str, set[str]] = {}
    for row in rows:
        if row["split"] == "train":
            keys.setdefault(row["user_id"], set()).add(key(row))
    aside = {}
    for user, found in keys.items():
        count = min(int(train_test * len(found) + 0.5), len(found) - 1)
        aside[user] = set(sorted(found)[:count])
    return [
        row | {"split": "train_test"} if row["split"] == "train" and key(row) in aside[row["user_id"]] else row for row in rows
    ]


def to_dataset(rows: list[dict]) -> Dataset:
    """Checked rows as a Dataset; optional columns that no row fills are left out."""
    from datasets import Dataset

    extra = [name for name in OPTIONAL if any(row.get(name) is not None for row in rows)]
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in (*COLUMNS, *extra)})


def _column(row: dict, place: str, *names: str, nullable: bool = False):
    """The first of the columns that the row has (and, if `nullable`, has a value)."""
    for name in names:
        if name in row and not (nullable and row[name] is None):
            return row[name]
    raise PyargsError(f"{place}: no column '{names[-1]}'.{did_you_mean(names[-1], row)}")


def _text(value, place: str, name: str) -> str:
    if not isinstance(value, str):
        raise PyargsError(f"{place}: {name} is {type(value).__name__}, not a string.")
    if not value.strip():
        raise PyargsError(f"{place}: {name} is empty.")
    return value


def _messages(value, place: str, name: str) -> Iterator[dict]:
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise PyargsError(f"{place}: {name} has a message without 'role' and 'content'.")
        yield {part: _text(message[part], place, f"{name}'s {part}") for part in ("role", "content")}


def _prompt(value, place: str) -> str | list[dict]:
    if not isinstance(value, list):
        return _text(value, place, "prompt")
    if not value:
        raise PyargsError(f"{place}: prompt is empty.")
    return list(_messages(value, place, "prompt"))


def _response(value, place: str, name: str) -> str:
    """A string, or TRL's conversational form of one: a list with a single assistant message."""
    if not isinstance(value, list):
        return _text(value, place, name)
    messages = list(_messages(value, place, name))
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise PyargsError(f"{place}: {name} must be a string or a list of one assistant message.")
    return messages[0]["content"]


def _pair_id(row: dict) -> str:
    """An id from the texts, the same whichever response is preferred."""
    parts = [row["prompt"], *sorted((row["chosen"], row["rejected"]))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
