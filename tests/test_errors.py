"""What the system refuses has a sentence."""

from __future__ import annotations

import errno
import re

import pytest

import pyargs
from pyargs.errors import PyargsError, did_you_mean, refusal


def test_what_the_system_refuses_has_a_sentence():
    from safetensors import SafetensorError

    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    for error, part in (
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "/x: No space left on device. Fix: make room"),
        (full, "Fix: make room"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "Fix: allow it, or name a place that can be written"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "PYARGS_CACHE"),
        (
            RuntimeError("[enforce fail at inline_container.cc:668] . PytorchStreamWriter failed writing file data/0"),
            "make room",
        ),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 5952 vs 5844"), "make room"),
        (SafetensorError("Error while serializing: I/O error: Cannot allocate memory (os error 12)"), "not enough memory"),
        (OSError("Unknown error: Failed to launch worker thread: Resource temporarily unavailable"), "not enough memory"),
        (RuntimeError("can't start new thread"), "not enough memory"),
        (ImportError("x.so: failed to map segment from shared object"), "not enough memory"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory"),
        (RuntimeError("unable to mmap 512 bytes from file </x>: Cannot allocate memory (12)"), "not enough memory"),
        ("ü".encode, "PYTHONUTF8=1"),
    ):
        if callable(error):
            try:
                error("ascii")
            except UnicodeEncodeError as raised:
                error = raised
        assert part in refusal(error) and "\n" not in refusal(error)
    for error in (ValueError("x"), RuntimeError("x"), PyargsError("no memory"), KeyError("x")):
        assert refusal(error) is None


class Many(dict):
    def __iter__(self):
        raise AssertionError("a table of a million names is not gone through")


def test_names_that_may_be_meant_are_found_among_any_number():
    few, many = {f"user-{i:05d}": i for i in range(1000)}, Many({f"user-{i:05d}": i for i in range(100_000)})
    for wrong in ("user-0012", "user-0o012", "User-00012", "user-000123", "suer-00012", "user-00012 ", "user_00012"):
        for known in (few, many):
            assert "user-00012" in did_you_mean(wrong, known, limit=100), wrong
    assert did_you_mean("somebody else", many) == did_you_mean("x" * 10_000, many) == did_you_mean("", many) == ""
    assert did_you_mean("c", ["a", "b"]) == " There are: a, b."


@pytest.mark.parametrize("name, now", pyargs._MOVED.items())
def test_a_public_name_of_before_says_what_stands_in_its_place(name, now):
    with pytest.raises(AttributeError, match=re.escape(f"pyargs.{name} is gone: write {now}")):
        getattr(pyargs, name)
    assert not hasattr(pyargs, name) and name not in dir(pyargs)
    assert now.split("(")[0].removeprefix("pyargs.") in dir(pyargs)
