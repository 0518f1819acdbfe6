"""Ids of users: text everywhere. An integer is read as its digits, in data and in arguments alike."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral

import numpy as np

from pyargs.errors import PyargsError


def user_id(user) -> str:
    """The id as text. Raises PyargsError for what is neither a str nor an integer."""
    if isinstance(user, Integral) and not isinstance(user, bool):
        return str(int(user))
    if not isinstance(user, str):
        raise PyargsError(f"a user id is a str, or an integer, got {type(user).__name__}: {str(user)[:60]}")
    return user


def user_ids(users: Iterable[str]) -> list[str]:
    """A list of ids as text. Raises PyargsError for a single str, whose letters would count as users, and for a set, which has
    no order."""
    if isinstance(users, (set, frozenset)):
        raise PyargsError("users is a list with one id for each row, got a set, which has no order: write a list")
    if isinstance(users, (str, bytes)) or not isinstance(users, Iterable) or getattr(users, "ndim", 1) == 0:
        raise PyargsError(f"users is a list with one id for each row, got {users!r}: write [{users!r}]")
    return [user if type(user) is str else user_id(user) for user in users]


LOWER = (1 << 32) - 1


class UserRows(Mapping):
    """Different ids in rows: user -> row, like a dict, and `ids`, by row. Raises PyargsError for an id that is there twice.

    It is built four times as fast as a dict, which counts with a million ids. A sorted array holds half of each id's hash and
    its row; a look-up compares with `ids`, so that outdated entries find nothing. A dict holds what was looked up, and users
    who came or moved since.
    """

    def __init__(self, ids: Iterable[str] = ()):
        self.ids = user_ids(ids)
        self._found: dict[str, int] = {}
        self._lock = threading.Lock()  # a look-up may not note a row that somebody moves meanwhile
        hashes = np.fromiter(map(hash, self.ids), np.int64, len(self.ids)).view(np.uint64)
        self._sorted = np.sort(hashes << np.uint64(32) | np.arange(len(self.ids), dtype=np.uint64))
        half, seen = self._sorted >> np.uint64(32), set()
        alike = np.flatnonzero(half[1:] == half[:-1])
        for key in self._sorted[np.union1d(alike, alike + 1)].tolist():
            user = self.ids[key & LOWER]
            if user in seen:
                raise PyargsError(f"users: '{user}' is there twice")
            seen.add(user)

    def __repr__(self) -> str:
        return f"<{len(self)} users: {', '.join(self.ids[:5])}{', ...' if len(self) > 5 else ''}>"

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __getitem__(self, user: str) -> int:
        row = self._found.get(user)
        if row is None:
            with self._lock:
                row = self._found[user] = self._look_up(user)
        return row

    def _look_up(self, user: str) -> int:
        half = hash(user) & LOWER
        first, last = self._sorted.searchsorted(np.array([half << 32, half << 32 | LOWER], dtype=np.uint64))
        for key in self._sorted[first:last].tolist():
            row = key & LOWER
            if row < len(self.ids) and self.ids[row] == user:
                return row
        raise KeyError(user)

    def append(self, ids: list[str]) -> None:
        """Ids that are not there yet, in the next rows."""
        with self._lock:
            self._found.update(zip(ids, range(len(self), len(self) + len(ids)), strict=True))
            self.ids += ids

    def move(self, row: int, to: int) -> None:
        """Moves the user of one row to the row of another user, who is gone."""
        with self._lock:
            self._forget(to)
            user = self.ids[to] = self.ids[row]
            self._found[user] = to

    def cut(self, count: int) -> None:
        """Removes the rows from `count` on; users who moved from there to another row stay."""
        with self._lock:
            for row in range(count, len(self)):
                self._forget(row)
            del self.ids[count:]

    def _forget(self, row: int) -> None:
        if self._found.get(self.ids[row]) == row:
            del self._found[self.ids[row]]

    def __reduce__(self):
        return UserRows, (list(self.ids),)  # hashes are another process's
