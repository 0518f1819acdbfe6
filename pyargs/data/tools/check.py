"""What is wrong with a set of preferences, and what could be decided without knowing the user."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations

from pyargs.data import preferences
from pyargs.errors import PyargsError

FIRST = 3  # rows named for each finding
ONE_SIDED = 5.0  # points between the two sides from which a matter of form counts as an artefact
# What belongs to a template or to Python's way of printing, never to a text.
ARTEFACTS = {
    "template markers in a text": re.compile(r"<\|[a-z_]+\|>|</?s>|\[/?INST\]|<<SYS>>|<(start|end)_of_turn>"),
    "a printed list instead of its texts": re.compile(r"^\s*\[\s*['\"].*['\"]\s*\]\s*$", re.DOTALL),
}
TURNS = re.compile(r"^(Human|Assistant|User):", re.MULTILINE)
FORM = {
    "white space at the beginning": lambda text: text != text.lstrip(),
    "white space at the end": lambda text: text != text.rstrip(),
    "quotes around it": lambda text: len(text) > 1 and text.strip()[:1] in "\"'“" and text.strip()[-1:] in "\"'”",
    "a label in front": lambda text: bool(re.match(r"\W*(title|answer|summary|response|tl;?dr)\W*:", text, re.IGNORECASE)),
}


def check(rows: Iterable[tuple[str, dict]], *, embedder: str | None = "minilm") -> dict:
    """A report on rows with the columns of `pyargs.data`; (place, row) as `sources.rows` gives them.

    problems: what makes results wrong: rows that cannot be read, a user who is both trained on and adapted to, a pair in
    two splits of one user, a pair of train users among the adapt users', artefacts of form. notes: what a reader of results
    must know: prompts and pairs that splits share otherwise, repetitions, contradictions. blind: accuracies of
    `metrics.blind`. Each finding has a count and the first rows; an empty `problems` is a clean set.
    Raises PyargsError without a single readable row.
    """
    from pyargs.metrics.blind import blind

    problems, notes, good = defaultdict(list), defaultdict(list), []
    for place, raw in rows:
        try:
            good.append((place, preferences.check_row(raw, place)))
        except PyargsError as error:
            problems["rows that cannot be used"].append(str(error))
    if not good:
        raise PyargsError(f"no row can be used: {problems['rows that cannot be used'][0] if problems else 'there is none'}")
    _form(good, problems, notes)
    _leaks(good, problems, notes)
    table = {name: [row[name] for _, row in good] for name in ("user_id", "prompt", "chosen", "rejected", "split")}
    splits = {}
    for split in preferences.SPLITS:
        users = [user for user, s in zip(table["user_id"], table["split"], strict=True) if s == split]
        if users:
            splits[split] = {"pairs": len(users), "users": len(set(users))}
    return {
        "rows": len(good) + len(problems.get("rows that cannot be used", ())),
        "splits": splits,
        "problems": _shortened(problems),
        "notes": _shortened(notes),
        "blind": blind(table["prompt"], table["chosen"], table["rejected"], table["user_id"], embedder=embedder),
    }


def _shortened(found: dict[str, list[str]]) -> dict[str, dict]:
    return {name: {"count": len(places), "first": places[:FIRST]} for name, places in found.items() if places}


def _form(good, problems, notes) -> None:
    for place, row in good:
        turns = [row["prompt"]] if isinstance(row["prompt"], str) else [message["content"] for message in row["prompt"]]
        for name, pattern in ARTEFACTS.items():
            if any(pattern.search(text) for text in (*turns, row["chosen"], row["rejected"])):
                problems[name].append(place)
        if any(TURNS.search(text) for text in turns):
            notes["turns written into a prompt's text instead of messages"].append(place)
    for name, test in FORM.items():
        shares = [100 * sum(test(row[side]) for _, row in good) / len(good) for side in ("chosen", "rejected")]
        if len(good) >= 20 and abs(shares[0] - shares[1]) > ONE_SIDED:
            what = f"{name}: {shares[0]:.1f}% of the chosen, {shares[1]:.1f}% of the rejected"
            problems["a form that one side has"].append(what)


def _leaks(good, problems, notes) -> None:
    kinds, of_pair, of_prompt = defaultdict(dict), defaultdict(list), defaultdict(list)
    for place, row in good:
        kind = "train" if row["split"] in ("train", "train_test") else "adapt"
        kinds[row["user_id"]].setdefault(kind, place)
        prompt = json.dumps(row["prompt"])
        of_pair[(prompt, *sorted((row["chosen"], row["rejected"])))].append((place, row))
        of_prompt[prompt].append(row)
    for user, places in kinds.items():
        if len(places) == 2:
            problems["users trained on and adapted to"].append(f"{user}: {places['train']}, {places['adapt']}")
    for same in of_pair.values():
        if len(same) > 1:
            _same_pair(same, problems, notes)
    for prompt, several in of_prompt.items():
        for one, other in combinations(sorted({row["split"] for row in several}), 2):
            notes[f"prompts in {one} and {other}"].append(prompt[:80])


def _same_pair(same: list[tuple[str, dict]], problems, notes) -> None:
    by_user = defaultdict(list)
    for place, row in same:
        by_user[row["user_id"]].append((place, row))
    for user, several in by_user.items():
        places = f"{user}: " + ", ".join(place for place, _ in several)
        if len({row["split"] for _, row in several}) > 1:
            problems["one pair in two splits of a user"].append(places)
        if len({row["chosen"] for _, row in several}) > 1:
            notes["pairs that a user decides both ways"].append(places)
        elif len(several) > 1:
            notes["pairs that a user has more than once"].append(places)
    splits = {row["split"] for _, row in same}
    places = ", ".join(place for place, _ in same)
    if splits & {"train", "train_test"} and splits & {"support", "query"}:
        problems["pairs of train users among the adapt users'"].append(places)
    elif {"train", "train_test"} <= splits and len(by_user) > 1:
        notes["pairs of one user's train in another's train_test"].append(places)
