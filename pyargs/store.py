"""Results computed from texts, kept in the user's cache in SQLite, so that a killed run loses little."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

from pyargs.errors import PyargsError

AT_ONCE = 500  # variables of one query; SQLite's least limit is 999


class Store:
    """Text -> bytes in one file, made when it is missing. Processes may read and write it at once."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=60)
            self._database.execute("CREATE TABLE IF NOT EXISTS kept (text BLOB PRIMARY KEY, value BLOB NOT NULL)")

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_) -> None:
        self._database.close()

    def get(self, texts: Iterable[str]) -> dict[str, bytes]:
        """The values that are there; other texts are left out."""
        keys = {_key(text): text for text in texts}
        found, wanted = {}, list(keys)
        for start in range(0, len(wanted), AT_ONCE):
            part = wanted[start : start + AT_ONCE]
            places = ",".join("?" * len(part))
            with self._explained():
                rows = self._database.execute(f"SELECT text, value FROM kept WHERE text IN ({places})", part)
                found |= {keys[key]: value for key, value in rows}
        return found

    def put(self, values: dict[str, bytes]) -> None:
        """Keeps all of them or, if killed, none."""
        with self._explained(), self._database:
            rows = [(_key(text), value) for text, value in values.items()]
            self._database.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?)", rows)

    @contextmanager
    def _explained(self):
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise PyargsError(
                f"{self.path} cannot be used ({error}). Fix: remove it if it is damaged, or set PYARGS_CACHE to a folder that "
                "can be written."
            ) from None


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
