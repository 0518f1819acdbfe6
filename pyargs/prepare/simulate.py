"""Simulated users who label the same pairs: PReF needs many users per pair, which real data hardly ever have."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np

from pyargs.data import schema
from pyargs.data.demo import ATTRIBUTES
from pyargs.errors import PyargsError

# Measurable attributes of a response, which a simulated user may care about.
TASTES: dict[str, Callable[[str], float]] = {
    "length": lambda text: len(text.split()),
    **{name: function for name, (function, *_) in ATTRIBUTES.items()},
}


def simulate(
    rows: Sequence[dict], *, users: int, new_users: int, labels_per_pair: int, max_pairs: int | None = None, seed: int = 0
) -> tuple[list[dict], dict[str, int]]:
    """Simulated users over the pairs of checked rows: rows of users sim_... and new_sim_..., and counts.

    `users` label the pairs of train and train_test as they are split (one that is in both is left out, max_pairs drawn);
    `new_users` label those of support and query, each pair in one half. Raises PyargsError where there are no such pairs.
    """
    splits: dict[str, set[str]] = {}
    pairs: dict[str, dict] = {}
    for row in rows:
        key = schema.text_id(row)
        splits.setdefault(key, set()).add(row["split"])
        pairs.setdefault(key, row | {"pair_id": key})
    rng = random.Random(f"{seed} pairs")
    old, new = ("train", "train_test"), ("support", "query")
    trained = [pair | {"split": split} for split in old for key, pair in pairs.items() if splits[key] == {split}]
    trained = rng.sample(trained, min(max_pairs or len(trained), len(trained)))
    adapted = [pair for key, pair in pairs.items() if splits[key] <= set(new)]
    adapted = [pair | {"split": new[i % 2]} for i, pair in enumerate(rng.sample(adapted, len(adapted)))]
    made, counts = [], {}
    for name, count, some, of in (("sim", users, trained, old), ("new_sim", new_users, adapted, new)):
        if not count:
            continue
        if not some:
            raise PyargsError(f"the source has no rows of {' or '.join(of)} for simulated users to label.")
        labels = label_densely(some, users=count, labels_per_pair=min(labels_per_pair, count), name=name, seed=seed)
        counts |= {f"pairs labelled by {name} users": len(some), f"labels of {name} users": len(labels)}
        made += labels
    return made, counts


def label_densely(pairs: Sequence[dict], *, users: int, labels_per_pair: int, name: str = "sim", seed: int = 0) -> list[dict]:
    """`labels_per_pair` of `users` simulated users judge every pair; each wants a random mixture of measurable attributes.

    pairs: rows with prompt, chosen, rejected, pair_id and split, whose own label does not count. A user's reward of a
    response is the inner product of standard normal weights with its attributes, standardized over all responses; the label
    is the larger one, without noise. Raises PyargsError for more labels per pair than users.
    """
    if labels_per_pair > users:
        raise PyargsError(f"{labels_per_pair} labels per pair need at least as many simulated users, not {users}.")
    rng, stream = random.Random(f"{seed} {name}"), np.random.default_rng([seed, len(name), users])
    weights = stream.standard_normal((users, len(TASTES)))
    texts = [row[side] for row in pairs for side in ("chosen", "rejected")]
    values = np.array([[function(text) for function in TASTES.values()] for text in texts])
    scale = values.std(0)
    values = (values - values.mean(0)) / np.where(scale > 0, scale, 1.0)
    difference = values[0::2] - values[1::2]
    width = len(str(users - 1))
    rows = []
    for number, pair in enumerate(pairs):
        for user in sorted(rng.sample(range(users), labels_per_pair)):
            gap = float(weights[user] @ difference[number])
            if gap == 0.0:
                continue  # the two are alike in all that the user cares about
            sides = ("chosen", "rejected") if gap > 0 else ("rejected", "chosen")
            top = max(range(len(TASTES)), key=lambda i: abs(weights[user, i]))
            rows.append(
                {
                    "user_id": f"{name}_{user:0{width}d}",
                    "prompt": pair["prompt"],
                    "chosen": pair[sides[0]],
                    "rejected": pair[sides[1]],
                    "split": pair["split"],
                    "pair_id": pair["pair_id"],
                    "attribute": f"{'+' if weights[user, top] > 0 else '-'}{list(TASTES)[top]}",
                }
            )
    return rows
