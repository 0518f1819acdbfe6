"""Three human annotators who judged the same answers of language models: real labels of people who mostly agree.

File `prefs.jsonl.gz`: PandaLM's test set (Wang et al. 2024, Apache-2.0) without ties. There are no splits: one annotator can
be taken as the new user.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from pyargs.data import preferences, schema, sources
from pyargs.errors import PyargsError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset


def load(source: str | Path, *, new_user: str | None = None, train_test: float = 0.2, seed: int = 0) -> Dataset:
    """Pairs of the annotators, all to be trained on, or with one who is to be adapted to.

    new_user: an annotator whose prompts are halved into support and query; the others then lose the pairs of these prompts, so
    that no pair of a train user is the new user's. source: the folder of the file, or the file. Raises PyargsError.
    """
    path = sources.local(source)
    path = sources.one_of(path, "prefs", ".jsonl") if path.is_dir() else path
    rows = schema.checked(preferences.read(path))
    if new_user is not None:
        users = {row["user_id"] for row in rows}
        if new_user not in users:
            raise PyargsError(f"No annotator '{new_user}'.{did_you_mean(new_user, users)}")

        def part(row: dict) -> int:
            return int(hashlib.sha256(f"{seed} {row['prompt']}".encode()).hexdigest(), 16) % 4

        # Half of the prompts are the new user's, half of these to adapt with.
        splits = {
            row["user_id"]: {2: "support", 3: "query"} if row["user_id"] == new_user else {0: "train", 1: "train"}
            for row in rows
        }
        rows = [row | {"split": splits[row["user_id"]][part(row)]} for row in rows if part(row) in splits[row["user_id"]]]
    return schema.to_dataset(schema.carve(rows, train_test=train_test, seed=seed))
