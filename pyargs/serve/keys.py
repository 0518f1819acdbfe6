"""Who may ask the service: a JSON file with the hash of each key, and the users that the key is for.

    {"ops": {"sha256": "...", "admin": true}, "shop": {"sha256": "...", "users": ["ann", "shop-*"]}}

A name of `users` is an id, or what ids begin with, and a star. An admin's key is for all users. A key is 256 random bits, so
its plain SHA-256 tells nothing of it; passwords would need a slow hash, and what does not look like a key of `new` is none.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from pyargs.config import check_kinds
from pyargs.errors import FEW, PyargsError
from pyargs.files import read_json, write_json

FORM = re.compile(r"pyargs-[A-Za-z0-9_-]{43}")


@dataclass(frozen=True)
class Key:
    """What a key allows: everything to an admin, else to ask for, change and list its users."""

    name: str
    sha256: bytes
    admin: bool
    ids: frozenset[str] = frozenset()
    beginnings: tuple[str, ...] = ()

    def may(self, user: str) -> bool:
        return self.admin or user in self.ids or user.startswith(self.beginnings)

    def among(self, users: Collection[str]) -> Collection[str]:
        """Those of these users that the key may see."""
        return users if self.admin else Among(self, users)


@dataclass(frozen=True)
class Among(Collection):
    """Of many users nothing is listed or counted: a look-up takes as long as ever, and `len` is the number of all."""

    key: Key
    users: Collection[str]

    def __contains__(self, user) -> bool:
        return user in self.users and self.key.may(user)

    def __iter__(self) -> Iterator[str]:
        return filter(self.key.may, self.users)

    def __len__(self) -> int:
        return len(self.users) if len(self.users) > FEW else sum(1 for _ in self)


class Keys:
    """The keys of a file. Raises PyargsError for a file that is not as described above."""

    def __init__(self, file: str | Path):
        found = read_json(file)
        if not isinstance(found, dict) or not found:
            raise PyargsError(f"{file} holds no keys. Fix: pyargs key {file} NAME --admin makes one")
        self._keys = [_key(name, entry, f"{file}, key '{name}'") for name, entry in found.items()]
        hashes = [key.sha256 for key in self._keys]
        for number, one in enumerate(hashes):
            if one in hashes[:number]:
                twins = self._keys[hashes.index(one)].name, self._keys[number].name
                raise PyargsError(f"{file}: '{twins[0]}' and '{twins[1]}' are the same key: remove one of them")

    def find(self, token: str) -> Key | None:
        """The key with this text; None for another text. How long it takes does not depend on which key is near."""
        if not FORM.fullmatch(token):
            return None
        digest, found = _hash(token), None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found


def new(file: str | Path, name: str, *, admin: bool = False, users: Collection[str] = ()) -> str:
    """Adds a key to a file, which is made when it is missing, and returns its text, which nothing else holds.

    Raises PyargsError for a name that is there, and unless the key is either an admin's or for users.
    """
    found = read_json(file) if Path(file).exists() else {}
    if found:
        Keys(file)
    if name in found:
        raise PyargsError(f"{file} has a key '{name}' already: choose another name, or remove that one first")
    token = f"pyargs-{secrets.token_urlsafe(32)}"
    found[name] = {
        "sha256": _hash(token).hex(),
        **({"admin": True} if admin else {}),
        **({"users": [*users]} if users else {}),
    }
    _key(name, found[name], f"key '{name}'")
    write_json(file, found)
    return token


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _key(name: str, entry, where: str) -> Key:
    known = {"sha256": str, "admin": bool, "users": list[str]}
    if not isinstance(entry, dict) or (unknown := entry.keys() - known):
        raise PyargsError(
            f"{where}: it has sha256, and admin or users" + (f", no '{min(unknown)}'" if isinstance(entry, dict) else "")
        )
    check_kinds(entry, {"sha256": str, **{kind: known[kind] for kind in entry}}, where)
    if not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
        raise PyargsError(f"{where}: sha256 is the key's SHA-256, 64 digits in hexadecimal")
    admin, users = entry.get("admin", False), entry.get("users", [])
    if admin == bool(users):
        raise PyargsError(f"{where}: it is either an admin's (admin: true) or for users (users: a list of ids)")
    if wrong := [one for one in users if not one or one == "*"]:
        raise PyargsError(f"{where}: {wrong[0]!r} is no user: write an id, or its beginning and a star; all is admin")
    ids = frozenset(one for one in users if not one.endswith("*"))
    return Key(name, bytes.fromhex(entry["sha256"]), admin, ids, tuple(one[:-1] for one in users if one.endswith("*")))
