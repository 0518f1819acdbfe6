"""Rows of preference data: checking them, setting pairs aside, and making a Dataset of them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from pyargs.data import COLUMNS, SPLITS
from pyargs.errors import PyargsError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

OPTIONAL = ("user_type", "attribute")


def checked(rows: Iterable[dict] | Iterable[tuple[str, dict]], *, where: str = "rows") -> list[dict]:
    """Checks rows and returns their common columns; nothing is repaired or dropped. `where`: their origin, for messages."""
    checked: list[dict] = []
    kinds: dict[str, tuple[str, str]] = {}
    for number, row in enumerate(rows, 1):
        place, row = row if isinstance(row, tuple) else (f"{where}, row {number}", row)
        out = check_row(row, place)
        kind = kind_of(out)
        first_kind, first = kinds.setdefault(out["user_id"], (kind, place))
        if kind != first_kind:
            raise PyargsError(
                f"{place}: user '{out['user_id']}' has split '{out['split']}' here, but is one of the {first_kind} users "
                f"in {first}. A user is either trained on (train, train_test) or adapted to (support, query)."
            )
        if checked and isinstance(checked[0]["prompt"], str) != isinstance(out["prompt"], str):
            raise PyargsError(f"{place}: prompts must be all strings or all lists of messages; row 1 is the other kind.")
        checked.append(out)
    if not checked:
        raise PyargsError(f"{where}: no rows.")
    return checked


def check_row(row: dict, place: str) -> dict:
    """The common columns of one row. Raises PyargsError, which begins with `place`, for a bad row."""
    split = _column(row, place, "role", "split", nullable=True)
    if split == "adapt":
        raise PyargsError(f"{place}: a row of an adapt user needs a column 'role', 'support' or 'query'.")
    split = "train" if split == "all" else split
    if split not in SPLITS:
        raise PyargsError(f"{place}: unknown split '{split}'; known: all, {', '.join(SPLITS)}.")
    user = _id(_column(row, place, "user_id", "user"), place, "user_id")
    if (other := row.get("user")) is not None and (other := _id(other, place, "user")) != user:
        raise PyargsError(f"{place}: user is '{other}', but user_id '{user}': give one of them.")
    out = {"user_id": user, **_texts(row, place), "split": split}
    if out["chosen"] == out["rejected"]:
        raise PyargsError(f"{place}: chosen and rejected are the same text.")
    pair_id = row.get("pair_id")
    out["pair_id"] = text_id(out) if pair_id is None else _id(pair_id, place, "pair_id")
    return out | {name: None if row[name] is None else str(row[name]) for name in OPTIONAL if name in row}


def kind_of(row: dict) -> str:
    """Whether the row's user is one to train on ("train") or to adapt to ("adapt")."""
    return "train" if row["split"] in ("train", "train_test") else "adapt"


def carve(rows: list[dict], *, train_test: float = 0.2, by: str = "prompt", seed: int = 0) -> list[dict]:
    """Sets `split` to "train_test" for this share of each train user's prompts, unless a row has it already.

    Whole prompts are set aside, for all users at once: no prompt of anybody's train is in anybody's train_test.
    `by="pair"` sets pairs aside instead, for files where a few prompts serve all pairs. First this share of the prompts that
    users share is set aside; then, for each user, own prompts up to the share (rounded to the nearest; at least one prompt
    stays in train). Prompts are taken by a seeded hash: the outcome does not depend on the order of rows.
    """
    if not 0 <= train_test < 1:
        raise PyargsError(f"train_test is a share from 0 to below 1, not {train_test}.")
    if by not in ("prompt", "pair"):
        raise PyargsError(f"by is 'prompt' or 'pair', not '{by}'.")
    if train_test == 0 or any(row["split"] == "train_test" for row in rows):
        return rows

    def key(row: dict) -> str:
        # By its texts, since files may number the same pair differently.
        what = text_id(row) if by == "pair" else json.dumps(row["prompt"], sort_keys=True)
        return hashlib.sha256(f"{seed}\0{what}".encode()).hexdigest()

    keys = [key(row) if row["split"] == "train" else "" for row in rows]
    of_user: dict[str, set[str]] = {}
    users_of: dict[str, set[str]] = {}
    for row, found in zip(rows, keys, strict=True):
        if found:
            of_user.setdefault(row["user_id"], set()).add(found)
            users_of.setdefault(found, set()).add(row["user_id"])
    shared = sorted(found for found, users in users_of.items() if len(users) > 1)
    aside = set(shared[: int(train_test * len(shared) + 0.5)])
    aside -= {max(found) for found in of_user.values() if found <= aside}  # or nothing would be left to train this user on
    for found in of_user.values():
        count = min(int(train_test * len(found) + 0.5), len(found) - 1) - len(found & aside)
        aside.update(sorted(found - set(shared))[: max(0, count)])
    return [row | {"split": "train_test"} if found in aside else row for row, found in zip(rows, keys, strict=True)]


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
    unused = [name for name in row if name not in (*COLUMNS, "role", "user", *OPTIONAL)]  # what the others are taken from
    wanted = next(name for name in names if name in COLUMNS)
    needed = ", ".join(name for name in COLUMNS if name != "pair_id")
    raise PyargsError(f"{place}: no column '{wanted}'; a row has {needed}.{did_you_mean(wanted, unused)}")


def text(value, place: str, name: str) -> str:
    """The value. Raises PyargsError, which begins with `place`, unless it is text that is not blank."""
    if not isinstance(value, str):
        raise PyargsError(f"{place}: {name} is {type(value).__name__}, not a string.")
    if not value.strip():
        raise PyargsError(f"{place}: {name} is empty.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PyargsError(f"{place}: {name} holds half a character (a lone surrogate): it is not text.") from None
    return value


def _id(value, place: str, name: str) -> str:
    """An id as text; an integer becomes its digits, as everywhere (`user_ids`)."""
    return text(str(value) if type(value) is int else value, place, name)


def _messages(value, place: str, name: str) -> Iterator[dict]:
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise PyargsError(f"{place}: {name} has a message without 'role' and 'content'.")
        yield {part: text(message[part], place, f"{name}'s {part}") for part in ("role", "content")}


def _prompt(value, place: str) -> str | list[dict]:
    if not isinstance(value, list):
        return text(value, place, "prompt")
    if not value:
        raise PyargsError(f"{place}: prompt is empty.")
    return list(_messages(value, place, "prompt"))


def _texts(row: dict, place: str) -> dict:
    """Prompt, chosen and rejected. TRL's implicit prompt is what two lists of messages have in common at their beginning."""
    sides = {name: _column(row, place, name) for name in ("chosen", "rejected")}
    sides = {name: list(_messages(side, place, name)) if isinstance(side, list) else side for name, side in sides.items()}
    chosen, rejected = sides.values()
    if row.get("prompt") is None and isinstance(chosen, list) and isinstance(rejected, list):
        if chosen == rejected:
            raise PyargsError(f"{place}: chosen and rejected are the same text.")
        same = [one == other for one, other in zip(chosen, rejected, strict=False)]
        prompt = chosen[: [*same, False].index(False)]
        if not prompt:
            raise PyargsError(f"{place}: no prompt, and chosen and rejected do not begin with the same messages.")
    else:
        prompt = _prompt(_column(row, place, "prompt"), place)
    return {"prompt": prompt} | {name: _response(side, prompt, place, name) for name, side in sides.items()}


def _response(value, prompt: str | list[dict], place: str, name: str) -> str:
    """A string, or TRL's conversational form of one: a list with a single assistant message, or the prompt before it."""
    if not isinstance(value, list):
        return text(value, place, name)
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answer = value[len(asked) :] if value[: len(asked)] == asked else value
    if len(answer) != 1 or answer[0]["role"] != "assistant":
        raise PyargsError(f"{place}: {name} must be a string or a list of one assistant message, the prompt before it or not.")
    return answer[0]["content"]


def text_id(row: dict) -> str:
    """An id made from the texts, which does not depend on which response is preferred."""
    parts = [row["prompt"], *sorted((row["chosen"], row["rejected"]))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def normalized(text: str) -> str:
    """A text without case, punctuation and spacing: what two versions of one title have in common."""
    return re.sub(r"[\W_]+", " ", text).strip().casefold()
