"""Constructed users over HH-RLHF dialogues: `length` (longer or shorter replies) or `two_types` (helpful or harmless).

Files `length_prefs.jsonl.gz` and `two_types_prefs.jsonl.gz` in the common schema; texts: Anthropic HH-RLHF (MIT), labels of
`two_types`: a language model's (Siththaranjan et al. 2024). `length` has the users of TLDR: 10 to train on, 31 to adapt to.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from pyargs.data import preferences, schema, sources
from pyargs.errors import PyargsError

if TYPE_CHECKING:
    from datasets import Dataset

ROLES = {"Human": "user", "Assistant": "assistant"}


def load(source: str | Path, *, users: str = "length", train_test: float = 0.2, seed: int = 0) -> Dataset:
    """Pairs whose prompts are chat messages; the turns that HH-RLHF writes into one text are taken apart.

    source: the folder of the files, or one of them; users: "length" or "two_types". Prompts that do not end with a user's
    turn are left out (2 of the rows of two_types). Raises PyargsError.
    """
    if users not in ("length", "two_types"):
        raise PyargsError(f"users is 'length' or 'two_types', not '{users}'.")
    path = sources.local(source)
    path = sources.one_of(path, f"{users}_prefs", ".jsonl") if path.is_dir() else path
    rows = []
    for place, row in preferences.read(path):
        prompt = messages(row["prompt"]) if isinstance(row.get("prompt"), str) else row.get("prompt")
        if not isinstance(prompt, list) or prompt[-1]["role"] == "user":
            rows.append((place, row | {"prompt": prompt}))
    return schema.to_dataset(schema.carve(schema.checked(rows), train_test=train_test, seed=seed))


def messages(text: str) -> list[dict]:
    """The turns of "Human: ... Assistant: ..." (each after a blank line); empty turns go, turns of one side are joined."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant): ?", text)
    turns: list[dict] = []
    # Before the first mark stands nothing, or text of a user who was not marked.
    for name, content in zip(["Human", *parts[1::2]], [parts[0], *parts[2::2]], strict=True):
        if not content.strip():
            continue
        if turns and turns[-1]["role"] == ROLES[name]:
            turns[-1]["content"] += f"\n\n{content.strip()}"
        else:
            turns.append({"role": ROLES[name], "content": content.strip()})
    return turns
