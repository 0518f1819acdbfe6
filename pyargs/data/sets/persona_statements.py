"""Statements of people with and without ten attributes, and simulated users with a known sign for each attribute.

Files `prefs.jsonl.gz` and `users.jsonl.gz`; statements: anthropics/evals, persona (Perez et al. 2022, CC BY 4.0). Each
attribute has one prompt, so that prompts are the same in all splits: train_test holds out pairs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pyargs.data import preferences, sources

if TYPE_CHECKING:
    from datasets import Dataset


def load(source: str | Path, *, train_test: float = 0.2, seed: int = 0) -> Dataset:
    """60 train users and 20 new ones with 60 pairs each; `attribute` says what a pair is about.

    source: the folder of the files, or a file in the same schema. Raises PyargsError.
    """
    path = sources.local(source)
    path = sources.one_of(path, "prefs", ".jsonl") if path.is_dir() else path
    return preferences.load(path, train_test=train_test, by="pair", seed=seed)


def signs(source: str | Path) -> dict[str, dict[str, int]]:
    """{user: {attribute: +1 or -1}}: what each simulated user prefers. source: the folder. Raises PyargsError."""
    path = sources.one_of(sources.local(source), "users", ".jsonl")
    return {row["user"]: row["signs"] for _, row in sources.rows(path)}
