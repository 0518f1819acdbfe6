"""What an artefact may not do while it is read: run, import or fetch something, open files of elsewhere, take much memory."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.startfile", "pty.spawn")
FETCHES = ("socket.connect", "socket.getaddrinfo", "urllib.Request", "http.client.connect")
UNPICKLES = ("pickle.find_class",)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
NONBLOCKING, OPENED = 0o4000, 0x20  # of inotify(7)


class Violation(AssertionError):
    """An artefact did what it may not, or was answered wrongly."""


class Hang(BaseException):
    """A signal's, so that no `except Exception` takes it for an ordinary error."""


class Guard:
    """Watches this process. own: the folder that may be read and written; outside: a folder that nothing may open, by Python
    or by a library beneath it (inotify sees both)."""

    def __init__(self, own: Path, outside: Path):
        self.own, self.outside = os.path.realpath(own), os.path.realpath(outside)
        self.on, self.seen = False, []
        sys.addaudithook(self._hook)  # it stays as long as the process
        signal.signal(signal.SIGALRM, self._late)
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.inotify = self.libc.inotify_init1(NONBLOCKING)
        if self.libc.inotify_add_watch(self.inotify, self.outside.encode(), OPENED) < 0:
            raise OSError("inotify is needed to see which files are opened")

    def _hook(self, event: str, args: tuple) -> None:
        if not self.on:
            return
        if event in STARTS or event in FETCHES or event in UNPICKLES:
            self.seen.append(f"{event} {str(args)[:200]}")
        elif event == "import" and str(args[0]).partition(".")[0] == "trap":
            self.seen.append(f"import {args[0]}")
        elif event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
            path = os.fsdecode(args[0])
            if isinstance(args[2], int) and args[2] & WRITES and path != os.devnull:
                place = os.path.realpath(path) if "\0" not in path else path
                if not place.startswith((self.own, "/dev/shm", "/proc/self")) and "__pycache__" not in place:
                    self.seen.append(f"written: {place}")

    def _late(self, *_) -> None:
        raise Hang

    @contextmanager
    def watching(self, seconds: float):
        """Raises Violation behind the block for what was seen meanwhile, and where it takes more than these seconds."""
        self.seen.clear()
        signal.setitimer(signal.ITIMER_REAL, seconds)
        self.on = True
        try:
            yield
        except Hang:
            raise Violation(f"more than {seconds:g} seconds") from None
        finally:
            self.on = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            try:
                os.read(self.inotify, 1 << 16)
                self.seen.append(f"a file of {self.outside} was opened")
            except BlockingIOError:
                pass
            if self.seen:
                raise Violation("; ".join(self.seen[:3]))

    def close(self) -> None:
        os.close(self.inotify)


def limit_memory(more: int) -> None:
    """From now on the process may take so many bytes beyond what it has: what is asked for in vain shows as an error."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, resource.RLIM_INFINITY))
