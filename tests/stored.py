"""What is done to a store of users, by a test and by a process that it kills."""

from __future__ import annotations

import random
import sys

from pyargs.serve.store import UserStore

MOST = 10_000


def pair(text: str) -> dict:
    return {"prompt": "Which?", "chosen": text, "rejected": "no"}


def operations(seed: int, count: int = 400) -> list[tuple]:
    """What a process does to a store, one after the other."""
    rng, made = random.Random(seed), []
    for number in range(count):
        user = f"user-{rng.randrange(6)}"
        what = rng.choices(["add", "adapt", "delete", "mark"], [6, 3, 2, 1])[0]
        made.append((what, user, [pair(f"{number}-{i}" * rng.choice([1, 400])) for i in range(rng.randrange(1, 4))]))
    return made


def apply(store: UserStore, what: str, user: str, pairs: list[dict]) -> None:
    if what == "add":
        store.add(user, pairs, MOST)
    elif what == "adapt":
        if work := store.take():
            store.keep(work, f"{work.pairs}".encode(), {})
            store.finish(work)
    else:
        store.delete(user, mark=what == "mark")


if __name__ == "__main__":
    written = UserStore(sys.argv[1], "a model")
    for done, operation in enumerate(operations(int(sys.argv[2]))):
        apply(written, *operation)
        print(done, flush=True)
