"""Errors that a user can mend. Each message names the fix."""

from __future__ import annotations

import difflib
import errno
import importlib.util
import re
import string
from collections.abc import Collection, Iterator
from contextlib import contextmanager

LONGEST = 2000
"""Characters of a message."""


class PyargsError(RuntimeError):
    """Input, data or a request that cannot be served as given; the command line prints it without a traceback.

    Its message is one line: what it quotes of a file or a request may be anything.
    """

    def __init__(self, *args):
        super().__init__(*(one_line(one) if isinstance(one, str) else one for one in args))


def one_line(text: str) -> str:
    """The text with its lines joined, other letters that cannot be printed escaped, and its middle left out beyond LONGEST."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 4 :]}"
    if not text.isprintable():
        text = re.sub(r"\s*\n\s*", " ", text)
        escaped = (one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
        text = "".join(escaped)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 4 :]}"


class UnknownUser(PyargsError, KeyError):
    """A user id that the table does not hold. user: the id, where it was looked up there."""

    def __init__(self, message: str, user: str | None = None):
        super().__init__(message)
        self.user = user

    __str__ = RuntimeError.__str__  # KeyError would print the message quoted


FEW = 2000
"""Up to so many names are all compared with a wrong one, which takes some 20 ms. Among more, near spellings are looked up."""


def did_you_mean(name: str, known: Collection[str], limit: int = 3) -> str:
    """A closing sentence with the names nearest to `name`; where none is near, all of a short list, or nothing.

    Of more than FEW names, as a dict or a set, those that one letter more, less, other or at another place makes of `name`:
    this takes as long for a million of them.
    """
    if len(known) <= FEW:
        near = difflib.get_close_matches(name, known, n=limit, cutoff=0.5)
    else:
        near = list(dict.fromkeys(other for other in _misspelt(name[:100]) if other in known))[:limit]
    if near:
        return f" Did you mean: {', '.join(near)}?"
    return f" There are: {', '.join(known)}." if 0 < len(known) <= 12 else ""


def _misspelt(name: str) -> Iterator[str]:
    """What `name` may stand for, one letter away, or in other case; the likeliest first."""
    yield from (name.strip(), name.lower(), name.upper(), name.title())
    parts = [(name[:i], name[i:]) for i in range(len(name) + 1)]
    yield from (head + tail[1] + tail[0] + tail[2:] for head, tail in parts if len(tail) > 1)
    yield from (head + tail[1:] for head, tail in parts if tail)
    letters = dict.fromkeys(name + string.digits + string.ascii_letters + "_-. ")
    for head, tail in reversed(parts):  # ids often begin alike
        yield from (head + letter + tail for letter in letters)
        yield from (head + letter + tail[1:] for letter in letters if tail)


NO_MEMORY = re.compile(
    r"(can't|cannot|unable to) (allocate|mmap)|out of memory|bad_alloc|failed to map segment|"
    r"(launch worker thread|start new thread)",  # whose stack has no room
    re.IGNORECASE,
)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ELSEWHERE = "name a place that can be written (for the cache: PYARGS_CACHE)"
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


def no_memory(error: BaseException) -> bool:
    """Whether memory ran out, as Python, torch, Arrow, safetensors and the loader of extensions say it."""
    others = ("SafetensorError", "ArrowException")  # by name, so that errors need no import
    said = isinstance(error, (RuntimeError, OSError, ImportError)) or type(error).__name__ in others
    said = said and not isinstance(error, PyargsError)
    return isinstance(error, MemoryError) or (said and NO_MEMORY.search(str(error)) is not None)


def refusal(error: BaseException) -> str | None:
    """An error of the operating system with its fix, in one line; None for other errors.

    The system refuses files (missing, not allowed, a folder), room on the disk, memory, and names that its encoding lacks.
    """
    text = str(error)
    if isinstance(error, PyargsError):
        return None
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object!a} cannot be written as {error.encoding}, this locale's encoding. Fix: set PYTHONUTF8=1"
    if no_memory(error):
        return f"not enough memory ({first_line(error)}). Fix: free some, or take a smaller model, dtype or batch"
    if isinstance(error, OSError):
        number, reason = error.errno, error.strerror or first_line(error)
        reason = f"{error.filename}: {reason}" if error.filename is not None else reason
    elif type(error).__name__ == "SafetensorError":
        number = int(found[1]) if (found := re.search(r"os error (\d+)", text)) else None
        reason = first_line(error)
    elif "PytorchStreamWriter failed" in text or "unexpected pos" in text:  # torch.save, which does not say why
        number, reason = errno.ENOSPC, first_line(error)
    else:
        return None
    if number in NO_ROOM:
        return f"{reason}. Fix: make room on the disk, or {ELSEWHERE}"
    return f"{reason}. Fix: allow it, or {ELSEWHERE}" if number in NOT_ALLOWED else reason


@contextmanager
def explained(what: str, fix: str = ""):
    """Makes a PyargsError that begins with `what` from what the system refuses within; `fix` is said where that has none."""
    try:
        yield
    except Exception as error:
        if (why := refusal(error)) is None:
            raise
        raise PyargsError(f"{what}: {why}" + (f". Fix: {fix}" if fix and "Fix:" not in why else "")) from error


@contextmanager
def described(what: str):
    """Makes a PyargsError that begins with `what` from any error within: for what is made as a file describes it."""
    try:
        yield
    except PyargsError:
        raise
    except Exception as error:
        raise PyargsError(f"{what}: {refusal(error) or f'{type(error).__name__}: {first_line(error)}'}") from error


@contextmanager
def extra(name: str, what: str):
    """Around the import of packages that `pip install 'pyargs[NAME]'` brings. Raises a PyargsError where one is missing.

    `what` begins that message. A package that is installed but broken raises its own error.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or importlib.util.find_spec(package) is not None:
            raise
        raise PyargsError(f"{what} needs {package}, which is not installed. Fix: pip install 'pyargs[{name}]'") from error


def first_line(error: BaseException) -> str:
    """Of an error's message, or its kind where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
