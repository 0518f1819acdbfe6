"""What the system refuses has a sentence."""

from __future__ import annotations

import errno

from pyargs.errors import PyargsError, refusal


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
