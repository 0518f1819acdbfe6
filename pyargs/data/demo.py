"""The embedded set: 160 everyday prompts, four sampled answers of SmolLM2-135M to each, and users with a known taste.

Eight answers were sampled to a prompt, two under each of four hidden style instructions, and the four kept that differ most in
word length and first-person rate. New users share tastes with trained ones: the set shows adaptation, not new tastes.

A user's taste is an attribute that can be measured on a text, and a sign, for example longer words or shorter ones. Of
the four answers to a prompt the two that are furthest apart in the attribute make the pair, and the sign says which one
is chosen. Nothing is judged by a model. `demo/made.json` has the command that made the answers, and versions. They are
samples of a small model: fluent more often than true.
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pyargs.data import schema
from pyargs.errors import PyargsError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

FOLDER = Path(__file__).parent / "demo"
# Prompts by line of prompts.txt. No prompt is in two splits, for any user.
RANGES = {"train": (0, 88), "train_test": (88, 112), "support": (112, 128), "query": (128, 160)}
FIRST = set("i me my mine myself we us our ours ourselves i'm i've i'd i'll we're we've we'd we'll".split())
SECOND = set("you your yours yourself yourselves you're you've you'd you'll".split())


def _words(text: str) -> list[str]:
    """Runs of letters, with inner apostrophes: "don't" is one word, numbers are none."""
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*", text.lower().replace("’", "'"))


def _per_100_words(count: int, text: str) -> float:
    return 100 * count / max(1, len(_words(text)))


def word_length(text: str) -> float:
    """Mean word length in letters; 0 without words."""
    return sum(len(word.replace("'", "")) for word in _words(text)) / max(1, len(_words(text)))


def first_person(text: str) -> float:
    """I, me, my, we, us, our and the like, per 100 words."""
    return _per_100_words(sum(word in FIRST for word in _words(text)), text)


def second_person(text: str) -> float:
    """You, your and the like, per 100 words."""
    return _per_100_words(sum(word in SECOND for word in _words(text)), text)


def sentence_length(text: str) -> float:
    """Words per sentence. A sentence ends at . ! or ? before white space, at a line break, and at the end of the text."""
    sentences = [part for part in re.split(r"[.!?]+(?:\s+|$)|\n+", text) if _words(part)]
    return len(_words(text)) / max(1, len(sentences))


# name -> (function, least gap of a pair, words for more of it, words for less of it)
ATTRIBUTES: dict[str, tuple[Callable[[str], float], float, str, str]] = {
    "word_length": (word_length, 0.4, "longer words", "shorter words"),
    "first_person": (first_person, 4.0, "more I and we", "less I and we"),
    "second_person": (second_person, 4.0, "speaks to you", "does not say you"),
    "sentence_length": (sentence_length, 5.0, "longer sentences", "shorter sentences"),
}
TRAIN_USERS = {
    "ada": ("word_length", 1),
    "ben": ("word_length", -1),
    "cora": ("first_person", 1),
    "dan": ("first_person", -1),
    "eva": ("second_person", 1),
    "finn": ("second_person", -1),
    "gwen": ("sentence_length", 1),
    "hugo": ("sentence_length", -1),
    "iris": ("word_length", 1),
    "jack": ("word_length", -1),
    "kim": ("first_person", 1),
    "leo": ("first_person", -1),
}
NEW_USERS = {
    "mia": ("word_length", 1),
    "noah": ("word_length", -1),
    "olga": ("first_person", 1),
    "paul": ("sentence_length", -1),
}


def attribute(name: str, text: str) -> float:
    """The measured attribute of a text: letters per word, words per sentence, or a count per 100 words."""
    if name not in ATTRIBUTES:
        raise PyargsError(f"No attribute '{name}'.{did_you_mean(name, ATTRIBUTES)}")
    return ATTRIBUTES[name][0](text)


def users(kind: str | None = None) -> dict[str, tuple[str, int]]:
    """{user id: (attribute, +1 or -1)} of the users of a kind, "train" or "new", or of all."""
    kinds = {"train": TRAIN_USERS, "new": NEW_USERS, None: TRAIN_USERS | NEW_USERS}
    if kind not in kinds:
        raise PyargsError(f"Users are 'train' or 'new', not '{kind}'.")
    return dict(kinds[kind])


def describe(user: str) -> str:
    """A user's taste in a few words, such as "longer words"."""
    name, sign = users()[user]
    return ATTRIBUTES[name][2 if sign > 0 else 3]


def prompts(split: str | None = None) -> list[str]:
    """The prompts of a split ("train", "train_test", "support", "query"), or all 160."""
    lines = (FOLDER / "prompts.txt").read_text(encoding="utf-8").splitlines()
    if split is None:
        return lines
    if split not in RANGES:
        raise PyargsError(f"No split '{split}'.{did_you_mean(split, RANGES)}")
    return lines[slice(*RANGES[split])]


@cache
def answers() -> tuple[tuple[str, ...], ...]:
    """The four stored answers to each of the 160 prompts, in the order of `prompts()`."""
    found: dict[int, list[str]] = {}
    with gzip.open(FOLDER / "answers.jsonl.gz", "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            found.setdefault(row["prompt"], []).append(row["text"])
    return tuple(tuple(found[number]) for number in range(len(found)))


def load(*, max_pairs: int | None = None) -> Dataset:
    """One pair per user and prompt, unless the answers to the prompt are too much alike in the user's attribute.

    Columns as in `pyargs.data`, and `attribute`, such as "+word_length". Train users have pairs of the first 88 prompts
    (train) and the next 24 (train_test), new users of the next 16 (support) and the last 32 (query), all fewer those
    dropped. `max_pairs` keeps the first so many of each user and split.
    """
    rows = []
    lines = prompts()
    for user, (name, sign) in users().items():
        for split in ("train", "train_test") if user in TRAIN_USERS else ("support", "query"):
            pairs = [(number, *_pair(number, name)) for number in range(*RANGES[split]) if _pair(number, name)]
            for number, low, high in pairs[:max_pairs]:
                chosen, rejected = (high, low) if sign > 0 else (low, high)
                rows.append(
                    {
                        "user_id": user,
                        "prompt": lines[number],
                        "chosen": answers()[number][chosen],
                        "rejected": answers()[number][rejected],
                        "split": split,
                        "pair_id": "{:03d}-{}-{}".format(number, *sorted((low, high))),
                        "attribute": f"{'+' if sign > 0 else '-'}{name}",
                    }
                )
    return schema.to_dataset(schema.checked(rows, where="demo"))


def _pair(number: int, name: str) -> tuple[int, int] | None:
    """The answers (low, high) to a prompt that are furthest apart in the attribute; None if they are too close."""
    values = [attribute(name, text) for text in answers()[number]]
    low, high = max(itertools.permutations(range(len(values)), 2), key=lambda ends: values[ends[1]] - values[ends[0]])
    return (low, high) if values[high] - values[low] >= ATTRIBUTES[name][1] else None
