"""Errors that a user can mend. Each message names the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PyargsError(RuntimeError):
    """Input, data or a request that cannot be served as given; the command line prints it without a traceback."""


class UnknownUser(PyargsError, KeyError):
    """A user id that the table does not hold."""

    __str__ = RuntimeError.__str__  # KeyError would print the message quoted


def did_you_mean(name: str, known: Iterable[str], limit: int = 3) -> str:
    """A closing sentence with the names nearest to `name`; where none is near, all of a short list, or nothing."""
    known = list(known)
    if near := difflib.get_close_matches(name, known, n=limit, cutoff=0.5):
        return f" Did you mean: {', '.join(near)}?"
    return f" There are: {', '.join(known)}." if 0 < len(known) <= 12 else ""
