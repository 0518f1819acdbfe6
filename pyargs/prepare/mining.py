"""Hard negatives: to each text a similar text of another user."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pyargs.data.schema import normalized
from pyargs.errors import PyargsError, extra

SPARE = 50  # neighbours looked at beyond those that may be the user's own: near-duplicates among them


class Negative(NamedTuple):
    row: int  # of the similar text
    cosine: float
    rank: int  # 0 is the nearest that was allowed


def hard_negatives(
    users: Sequence[str],
    titles: Sequence[str],
    vectors: np.ndarray,
    *,
    k: int = 10,
    near: float = 0.95,
    seed: int = 0,
    keys: Sequence[str] | None = None,
    held: Sequence[bool] | None = None,
    progress: Callable = iter,
) -> list[Negative]:
    """For each of N texts, one of the k nearest texts of other users, drawn by a hash of seed, user and key.

    users, titles: N each; vectors: unit vectors float32 [N, d]; keys: N ids (default: the row numbers), so that a draw does
    not depend on the other rows; held: N, whether a text is held out (default: none is). Left out: texts with a title of the
    user's own (whoever has them), texts nearer than `near` in cosine (default 0.95), which are the same again, and, for texts
    that are not held out, titles taken for the user's held-out ones, so that no title is rejected both in training and in
    evaluation. Ties go to the lower row. Raises PyargsError where fewer than k are left for a text.
    """
    with extra("prepare", "the search for similar texts"):
        from sklearn.neighbors import NearestNeighbors

    names = [normalized(title) for title in titles]
    # Users may share a text: it stands in the pool once.
    first: dict[tuple[str, bytes], int] = {}
    for row, (name, vector) in enumerate(zip(names, vectors, strict=True)):
        first.setdefault((name, vector.tobytes()), row)
    pool = np.array(list(first.values()))
    place = {row: i for i, row in enumerate(pool.tolist())}
    own: dict[str, set[str]] = {}
    for user, name in zip(users, names, strict=True):
        own.setdefault(user, set()).add(name)
    count = min(len(pool), k + 2 * max(map(len, own.values())) + SPARE)  # the user's own, and as many that are taken
    search = NearestNeighbors(n_neighbors=count, metric="cosine", algorithm="brute").fit(vectors[pool])
    distances, neighbours = search.kneighbors(vectors[pool])

    held = [False] * len(names) if held is None else held
    taken: dict[str, set[str]] = {user: set() for user in own}
    found: dict[int, Negative] = {}
    for row in progress(sorted(range(len(names)), key=lambda row: not held[row])):  # those that are held out first
        i = place[first[names[row], vectors[row].tobytes()]]
        allowed = []
        # Six digits: the seventh depends on the batch in which a text was embedded.
        for distance, j in sorted(zip(distances[i].round(6).tolist(), pool[neighbours[i]].tolist(), strict=True)):
            if names[j] not in own[users[row]] and 1 - distance < near and (held[row] or names[j] not in taken[users[row]]):
                allowed.append(Negative(j, 1 - distance, len(allowed)))
                if len(allowed) == k:
                    break
        if len(allowed) < k:
            raise PyargsError(
                f"'{titles[row][:60]}' of user {users[row]}: {len(allowed)} of {k} similar texts of others are left after the "
                "user's own, near-duplicates and those taken for held-out texts. Fix: more users, a smaller k, or a higher "
                "limit of nearness (near)."
            )
        key = keys[row] if keys is not None else row
        found[row] = random.Random(f"{seed} {users[row]} {key}").choice(allowed)
        if held[row]:
            taken[users[row]].add(names[found[row].row])
    return [found[row] for row in range(len(names))]
