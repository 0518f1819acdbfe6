"""`pyargs serve` as a process of its own, and the model that it serves, for the benchmarks that ask it over HTTP."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psutil

import pyargs
from pyargs.methods import lore


def trained(policy: str, folder: Path) -> list[str]:
    """Saves a LoRE model of the demo pairs; returns its users."""
    config = lore.Config(backbone=policy, freeze_backbone=True, rank=4, epochs=3)
    model = pyargs.train("lore", pyargs.load_pairs("demo"), config)
    model.save_pretrained(folder)
    return list(model.known_users)


@cache
def pairs_of(which: int) -> list[dict]:
    """Three pairs of a user of the demo set, as the service takes them."""
    rows = list(pyargs.load_pairs("demo"))
    users = sorted({row["user_id"] for row in rows})
    own = [row for row in rows if row["user_id"] == users[which % len(users)]]
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in own[which : which + 3]]


@contextmanager
def serving(words: Sequence[str]) -> Iterator[tuple[str, psutil.Process]]:
    """Runs `pyargs serve WORDS`; gives its address, without /v1, and its process. It is told to end behind the block."""
    command = [sys.executable, "-m", "pyargs.cli", "serve", *words, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"at (http\S+)/v1", line):
                break
        else:
            raise RuntimeError("the service ended at once: " + "".join(said))
        threading.Thread(target=process.stderr.read, daemon=True).start()  # its log would fill the pipe
        yield found[1], psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)
