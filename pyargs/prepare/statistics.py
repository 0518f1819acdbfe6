"""Counts and lengths of a set of preferences."""

from __future__ import annotations

import json
from collections import Counter
from statistics import mean, median

from pyargs import data


def statistics(dataset) -> dict:
    """Counts of a Dataset with the common columns; lengths are in words (split at white space).

    users_per_pair tells how densely users overlap: 1 everywhere is a sparse set, in which no two users judge the same pair.
    """

    def words(value) -> int:
        texts = [value] if isinstance(value, str) else [message["content"] for message in value]
        return sum(len(text.split()) for text in texts)

    table = {name: dataset[name][:] for name in dataset.column_names}
    splits = {}
    for split in data.SPLITS:
        of_user = Counter(user for user, s in zip(table["user_id"], table["split"], strict=True) if s == split)
        if of_user:
            counts = {"pairs": of_user.total(), "users": len(of_user), "pairs_per_user": spread(list(of_user.values()))}
            splits[split] = counts
    prompts = [json.dumps(prompt) for prompt in table["prompt"]]
    pairs: dict[tuple, set[str]] = {}
    for prompt, *two, user in zip(prompts, table["chosen"], table["rejected"], table["user_id"], strict=True):
        pairs.setdefault((prompt, *sorted(two)), set()).add(user)
    return {
        "pairs": len(dataset),
        "users": len(set(table["user_id"])),
        "prompts": len(set(prompts)),
        "different_pairs": len(pairs),
        "users_per_pair": spread([len(users) for users in pairs.values()]),
        "pair_ids": len(set(table["pair_id"])),
        "columns": dataset.column_names,
        "splits": splits,
        "words": {name: spread([words(value) for value in table[name]]) for name in ("prompt", "chosen", "rejected")},
        "sha256": data.content_hash(dataset),
    }


def spread(values: list) -> dict:
    return {"min": min(values), "median": median(values), "mean": round(mean(values), 2), "max": max(values)}
