"""The users of a service in one SQLite file: their pairs, their vectors, and the jobs that make one from the other.

What a call has written is on the disk when it returns. What `delete` has removed is in no byte of the files when it returns.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pyargs.errors import PyargsError, explained

APPLICATION, VERSION = int.from_bytes(b"pyar", "big"), 1
PAGE = 1024
# `secure_delete` overwrites a row that goes, but not the copies that SQLite left behind when it moved that row between the
# pages of a table. So each row with something of a user in it begins with `pad`, a page of zeros: what follows then lies in
# overflow pages, which belong to this row alone, are never copied, and are overwritten when it goes.
SCHEMA = f"""
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL);
CREATE TABLE users (
    number INTEGER PRIMARY KEY AUTOINCREMENT, created REAL NOT NULL, adapted REAL,
    pad BLOB NOT NULL DEFAULT (zeroblob({PAGE})), id TEXT NOT NULL, made TEXT, vector BLOB
);
CREATE TABLE pairs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, user INTEGER NOT NULL REFERENCES users ON DELETE CASCADE, count INTEGER NOT NULL,
    pad BLOB NOT NULL DEFAULT (zeroblob({PAGE})), texts TEXT NOT NULL
);
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, user INTEGER NOT NULL REFERENCES users ON DELETE CASCADE, status TEXT NOT NULL,
    pairs INTEGER NOT NULL, created REAL NOT NULL, started REAL, finished REAL, pad BLOB, error TEXT
);
CREATE TABLE deleted (mark BLOB PRIMARY KEY);
CREATE INDEX pairs_user ON pairs (user);
CREATE INDEX jobs_user ON jobs (user);
CREATE INDEX jobs_open ON jobs (user) WHERE status IN ('queued', 'running');
"""


class DiskError(PyargsError):
    """The file cannot be read or written."""


class TooManyPairs(PyargsError):
    """A user would have more pairs than one may have."""


@dataclass(frozen=True)
class Work:
    """What is to be adapted: all pairs of a user, who has this number for as long as the store knows them."""

    number: int
    user: str
    pairs: list[dict]


class UserStore:
    """The file is made when it is missing, and belongs to one process at a time. Threads may share a store.

    model: what the vectors are for, as text; a file with another model's vectors is refused. Raises PyargsError: a file that
    is in use, that is another's, of a later version, or that cannot be written; each method DiskError, if the disk refuses.
    """

    def __init__(self, path: str | Path, model: str):
        self.path, self.model, self._lock = Path(path), model, threading.RLock()
        with explained(f"{self.path} cannot be opened"):
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        try:
            with self._explained():
                self._database = sqlite3.connect(self.path, timeout=0, isolation_level=None, check_same_thread=False)
                self._open(model)
        except BaseException:
            if hasattr(self, "_database"):
                self._database.close()
            raise

    def _open(self, model: str) -> None:
        self._ask("PRAGMA locking_mode = EXCLUSIVE")
        (owner,), (version,) = self._ask("PRAGMA application_id")[0], self._ask("PRAGMA user_version")[0]
        (tables,) = self._ask("SELECT count(*) FROM sqlite_master")[0]
        if (owner, version) != (APPLICATION, VERSION) and (owner or tables):
            what = f"of version {version}, this pyargs reads {VERSION}" if owner == APPLICATION else "of another program"
            raise PyargsError(f"{self.path} is a database {what}. Fix: name another file for the users")
        with explained(f"{self.path} cannot be kept from others"):  # it holds texts of users
            for end in ("", "-wal", "-shm"):
                if (file := Path(f"{self.path}{end}")).exists():
                    file.chmod(0o600)  # what SQLite makes later has the mode of the first
        self._ask(f"PRAGMA page_size = {PAGE}")
        if self._ask("PRAGMA journal_mode = WAL") != [("wal",)]:
            raise PyargsError(f"{self.path}: this file system has no write-ahead log. Fix: put the file on a local disk")
        for setting in ("synchronous = FULL", "secure_delete = ON", "foreign_keys = ON", "temp_store = MEMORY"):
            self._ask(f"PRAGMA {setting}")
        with self._change():  # takes the lock of the file, which is kept
            if not tables:
                for statement in SCHEMA.split(";"):
                    self._ask(statement)
                self._ask(f"PRAGMA application_id = {APPLICATION}")
                self._ask(f"PRAGMA user_version = {VERSION}")
                values = [("model", model.encode()), ("key", secrets.token_bytes(32))]
                self._database.executemany("INSERT INTO meta VALUES (?, ?)", values)
            meta = dict(self._ask("SELECT name, value FROM meta"))
            self._ask("UPDATE jobs SET status = 'queued', started = NULL WHERE status = 'running'")
        if meta["model"] != model.encode():
            raise PyargsError(
                f"{self.path} holds vectors for another model (other weights, method or settings). Fix: serve the folder that "
                "they were made with, or name another file for the users of this one"
            )
        self._key = meta["key"]
        self._numbers = {user: number for number, user in self._ask("SELECT number, id FROM users")}
        self._truncate()  # of a process that was killed before it did

    def close(self) -> None:
        with self._lock:
            self._database.close()

    # -- users ---------------------------------------------------------------------------------------------------------

    @property
    def users(self) -> list[str]:
        """The ids of all users, those without a vector too."""
        with self._lock:
            return list(self._numbers)

    def __contains__(self, user: str) -> bool:
        return user in self._numbers

    def number(self, user: str) -> int | None:
        """Of a user who is here; nobody else ever has it."""
        return self._numbers.get(user)

    def add(self, user: str, pairs: list[dict], most: int) -> dict:
        """Keeps pairs of a user, who may be new, and a job that adapts to all of theirs; returns the job.

        Raises TooManyPairs, and keeps nothing, where the user would have more than `most` pairs.
        """
        job, now = secrets.token_hex(16), time.time()
        texts = json.dumps(pairs, ensure_ascii=False)
        with self._lock:
            with self._change():
                number = self._numbers.get(user)
                before = 0 if number is None else self._count(number)
                if before + len(pairs) > most:
                    raise TooManyPairs(f"a user has at most {most} pairs: {before} are there, {len(pairs)} came")
                if number is None:
                    number = self._database.execute("INSERT INTO users (created, id) VALUES (?, ?)", (now, user)).lastrowid
                self._ask("INSERT INTO pairs (user, count, texts) VALUES (?, ?, ?)", number, len(pairs), texts)
                values = job, number, before + len(pairs), now
                self._ask("INSERT INTO jobs (id, user, status, pairs, created) VALUES (?, ?, 'queued', ?, ?)", *values)
            self._numbers[user] = number
            return self.job(job)

    def user(self, user: str) -> dict | None:
        """How many pairs a user has, when they came and were adapted to, by what the vector was made, and the last job."""
        with self._lock:
            if (number := self._numbers.get(user)) is None:
                return None
            ((created, adapted, made),) = self._ask("SELECT created, adapted, made FROM users WHERE number = ?", number)
            job = self._ask("SELECT id FROM jobs WHERE user = ? ORDER BY rowid DESC LIMIT 1", number)
            return {
                "id": user,
                "pairs": self._count(number),
                "created": created,
                "adapted": adapted,
                "made": json.loads(made) if made else None,
                "job": self.job(job[0][0]) if job else None,
            }

    def vectors(self) -> Iterator[tuple[str, bytes]]:
        """Of each user who has been adapted to: the id, and the bytes that `keep` was given."""
        with self._lock:
            yield from self._ask("SELECT id, vector FROM users WHERE vector IS NOT NULL ORDER BY number")

    def delete(self, user: str, *, mark: bool = False) -> None:
        """Removes a user with pairs, vector and jobs from all bytes of the files. mark: `marked` then knows the id."""
        with self._lock:
            with self._change():
                if (number := self._numbers.get(user)) is not None:
                    self._ask("DELETE FROM users WHERE number = ?", number)
                if mark:
                    self._ask("INSERT OR IGNORE INTO deleted VALUES (?)", self._mark(user))
            self._numbers.pop(user, None)
            with self._explained():
                self._truncate()

    def marked(self, users: Iterable[str]) -> list[str]:
        """Which of these ids `delete` has marked."""
        with self._lock:
            marks = {mark for (mark,) in self._ask("SELECT mark FROM deleted")}
        return [user for user in users if self._mark(user) in marks] if marks else []

    def _mark(self, user: str) -> bytes:
        """Of an id a hash under this file's own key: the file does not hold the id, and who has the file can only try ids."""
        return hashlib.blake2b(user.encode(), key=self._key, digest_size=16).digest()

    # -- jobs ----------------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> list[str]:
        """The users who are to be adapted to, or are being."""
        with self._lock:
            chosen = "number IN (SELECT user FROM jobs WHERE status IN ('queued', 'running'))"
            return [user for (user,) in self._ask(f"SELECT id FROM users WHERE {chosen} ORDER BY number")]

    def job(self, job: str) -> dict | None:
        with self._lock, self._explained():
            columns = "jobs.id, users.id, status, pairs, jobs.created, started, finished, error"
            found = self._ask(f"SELECT {columns} FROM jobs JOIN users ON user = number WHERE jobs.id = ?", job)
        names = ("id", "user", "status", "pairs", "created", "started", "finished", "error")
        return dict(zip(names, found[0], strict=True)) if found else None

    def take(self) -> Work | None:
        """The next user to adapt to. All jobs of this user that wait are running then."""
        with self._change():
            found = self._ask(
                "SELECT number, users.id FROM jobs JOIN users ON user = number WHERE status = 'queued' "
                "ORDER BY jobs.rowid LIMIT 1"
            )
            if not found:
                return None
            number, user = found[0]
            self._ask(
                "UPDATE jobs SET status = 'running', started = ? WHERE user = ? AND status = 'queued'", time.time(), number
            )
            texts = self._ask("SELECT texts FROM pairs WHERE user = ? ORDER BY number", number)
            return Work(number, user, [pair for (several,) in texts for pair in json.loads(several)])

    def has(self, work: Work) -> bool:
        """Whether the user is still the one that the work was for: neither deleted, nor deleted and there again."""
        return self.number(work.user) == work.number

    def keep(self, work: Work, vector: bytes, made: dict) -> None:
        """Keeps the vector of a user who is there; `made` says how it was made. The jobs run on until `finish`."""
        with self._change():
            values = vector, json.dumps(made), time.time(), work.number
            self._ask("UPDATE users SET vector = ?, made = ?, adapted = ? WHERE number = ?", *values)

    def finish(self, work: Work, error: str | None = None) -> None:
        """Ends the user's running jobs, which are done, or failed with this error."""
        with self._change():
            values = ("done", None, None) if error is None else ("failed", bytes(PAGE), error)
            ended = "UPDATE jobs SET status = ?, pad = ?, error = ?, finished = ? WHERE user = ? AND status = 'running'"
            self._ask(ended, *values, time.time(), work.number)

    def put_back(self, work: Work) -> None:
        """The user's running jobs wait again."""
        with self._change():
            self._ask("UPDATE jobs SET status = 'queued', started = NULL WHERE user = ? AND status = 'running'", work.number)

    # -- the file ------------------------------------------------------------------------------------------------------

    def _count(self, number: int) -> int:
        return self._ask("SELECT coalesce(sum(count), 0) FROM pairs WHERE user = ?", number)[0][0]

    def _ask(self, statement: str, *values) -> list[tuple]:
        with self._explained():
            return self._database.execute(statement, values).fetchall()

    @contextmanager
    def _change(self):
        """Of what happens within all is on the disk at the end, or nothing."""
        with self._lock, self._explained():
            self._ask("BEGIN IMMEDIATE")
            try:
                yield
                self._ask("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._ask("ROLLBACK")
                raise

    def _truncate(self) -> None:
        """Moves the write-ahead log, which holds pages as they were, into the file, and empties it."""
        ((busy, *_),) = self._ask("PRAGMA wal_checkpoint(TRUNCATE)")
        if busy:
            raise DiskError(f"{self.path}: the write-ahead log could not be emptied")

    @contextmanager
    def _explained(self):
        try:
            yield
        except sqlite3.Error as error:
            if "locked" in str(error):
                raise DiskError(
                    f"{self.path} is in use by another process, and belongs to one at a time. Fix: end that one, or name "
                    "another file for the users"
                ) from None
            raise DiskError(
                f"{self.path} cannot be used ({error}). Fix: make room on its disk, or restore it from a copy if it is damaged"
            ) from None
