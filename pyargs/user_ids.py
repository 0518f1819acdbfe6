"""Ids of users: text everywhere. An integer is read as its digits, in data and in arguments alike."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral

from pyargs.errors import PyargsError


def user_id(user) -> str:
    """The id as text. Raises PyargsError for what is neither a str nor an integer."""
    if isinstance(user, Integral) and not isinstance(user, bool):
        return str(int(user))
    if not isinstance(user, str):
        raise PyargsError(f"a user id is a str, or an integer, got {type(user).__name__}: {str(user)[:60]}")
    return user


def user_ids(users: Iterable[str]) -> list[str]:
    """A list of ids as text. Raises PyargsError for one id in the place of a list, whose letters would count as users, and
    for a set, whose order is not the rows'."""
    if isinstance(users, (set, frozenset)):
        raise PyargsError("users is a list with one id for each row, got a set, which has no order: write a list")
    if isinstance(users, (str, bytes)) or not isinstance(users, Iterable) or getattr(users, "ndim", 1) == 0:
        raise PyargsError(f"users is a list with one id for each row, got {users!r}: write [{users!r}]")
    return [user if type(user) is str else user_id(user) for user in users]
