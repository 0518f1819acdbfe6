"""Checks of a set of preferences: what is wrong with it, and what can be decided without knowing the user."""

from __future__ import annotations

import ast
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations

from pyargs.data import SPLITS, schema
from pyargs.data.schema import normalized
from pyargs.errors import PyargsError

FIRST = 3  # rows named for each finding
REPEATED = 5.0  # percent of a split's pairs from which responses that users have rejected before are an artefact
ONE_SIDED = 5.0  # points between the two sides from which a matter of form counts as an artefact
DECIDED = 75.0  # percent from which a scorer of form alone is worth a note
# What belongs to a template, never to a text.
MARKERS = re.compile(r"<[|｜][^|｜\s<>]{1,40}[|｜]>|^\s*<s>|</s>\s*$|\[/?INST\]|<<SYS>>|<(start|end)_of_turn>")
TURNS = re.compile(r"^(### ?)?(Human|Assistant|User|Instruction|Response):", re.MULTILINE)
FORM = {
    "white space at the beginning": lambda text: text != text.lstrip(),
    "white space at the end": lambda text: text != text.rstrip(),
    "quotes around it": lambda text: len(text) > 1 and text.strip()[:1] in "\"'“" and text.strip()[-1:] in "\"'”",
    "a label in front": lambda text: bool(re.match(r"\W*(title|answer|summary|response|tl;?dr)\W*:", text, re.IGNORECASE)),
}


def report(rows: Iterable[tuple[str, dict]], *, embedder: str | None = "minilm") -> dict:
    """A report on rows with the columns of `pyargs.data`; (place, row) as `sources.rows` gives them.

    problems make results wrong: rows that cannot be used, users who are both trained on and adapted to, an answer known from
    another split of the same user, artefacts of form. notes are for readers of results: prompts and pairs that splits or
    users share otherwise, repetitions, contradictions, a form that decides. Users may share prompts and pairs, since comparing
    users needs that. blind: accuracies of `metrics.blind`. Each finding has a count and its first rows; a clean set has no
    problems. Raises PyargsError without a single readable row.
    """
    from pyargs.metrics.blind import FORM_SCORERS, blind

    problems, notes, good = defaultdict(list), defaultdict(list), []
    for place, raw in rows:
        try:
            good.append((place, schema.check_row(raw, place)))
        except PyargsError as error:
            problems["rows that cannot be used"].append(str(error))
    if not good:
        raise PyargsError(f"no row can be used: {problems['rows that cannot be used'][0] if problems else 'there is none'}")
    _form(good, problems, notes)
    _leaks(good, problems, notes)
    table = {name: [row[name] for _, row in good] for name in ("user_id", "prompt", "chosen", "rejected", "split")}
    splits, of_split = {}, {}
    for split in SPLITS:
        users = [user for user, s in zip(table["user_id"], table["split"], strict=True) if s == split]
        of_split[split] = set(users)
        if users:
            splits[split] = {"pairs": len(users), "users": len(of_split[split])}
    for one, other in (("query", "support"), ("support", "query"), ("train_test", "train")):
        notes[f"users with {one} pairs and no {other} pairs"] += sorted(of_split[one] - of_split[other])
    found = blind(table["prompt"], table["chosen"], table["rejected"], table["user_id"], embedder=embedder)
    for name in FORM_SCORERS:
        if (reached := max(found[name]["accuracy"], found[name]["reversed"])) >= DECIDED:
            notes["a form that decides"].append(f"{name}: {reached}% of the pairs")
    return {
        "rows": len(good) + len(problems.get("rows that cannot be used", ())),
        "splits": splits,
        "problems": _shortened(problems),
        "notes": _shortened(notes),
        "blind": found,
    }


def _shortened(found: dict[str, list[str]]) -> dict[str, dict]:
    return {name: {"count": len(places), "first": places[:FIRST]} for name, places in found.items() if places}


def _printed(text: str) -> bool:
    """Whether a text is a printed Python list: a list of replies or messages that was stored as one text."""
    if not (text.strip().startswith("[") and text.strip().endswith("]")):
        return False
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False
    return isinstance(value, list) and bool(value) and all(isinstance(part, (str, dict)) for part in value)


def _form(good, problems, notes) -> None:
    kinds = {isinstance(row["prompt"], str) for _, row in good}
    if len(kinds) > 1:
        problems["prompts of both kinds, texts and messages"].append(f"{good[0][0]} is the one, another row the other")
    for place, row in good:
        turns = [row["prompt"]] if isinstance(row["prompt"], str) else [message["content"] for message in row["prompt"]]
        texts = (*turns, row["chosen"], row["rejected"])
        if any(MARKERS.search(text) for text in texts):
            problems["template markers in a text"].append(place)
        if any(_printed(text) for text in texts):
            problems["a printed list instead of its texts"].append(place)
        if any(TURNS.search(text) for text in turns):
            notes["turns written into a prompt's text instead of messages"].append(place)
        if not isinstance(row["prompt"], str):
            roles = [message["role"] for message in row["prompt"]]
            if roles[-1] != "user" or set(roles) - {"system", "user", "assistant"}:
                problems["prompts that do not end with a user's turn, or have unknown roles"].append(place)
        if row["chosen"].strip().casefold() == row["rejected"].strip().casefold():
            notes["responses that differ in white space or case alone"].append(place)
    for name, test in FORM.items():
        shares = [100 * sum(test(row[side]) for _, row in good) / len(good) for side in ("chosen", "rejected")]
        if len(good) >= 20 and abs(shares[0] - shares[1]) > ONE_SIDED:
            what = f"{name}: {shares[0]:.1f}% of the chosen, {shares[1]:.1f}% of the rejected"
            problems["a form that one side has"].append(what)


def _leaks(good, problems, notes) -> None:
    kinds, of_pair, of_prompt, of_answer = defaultdict(dict), defaultdict(list), defaultdict(list), defaultdict(list)
    numbered = defaultdict(dict)
    for place, row in good:
        kinds[row["user_id"]].setdefault(schema.kind_of(row), place)
        prompt = json.dumps(row["prompt"])
        texts = (prompt, *sorted((row["chosen"].strip(), row["rejected"].strip())))
        of_pair[texts].append((place, row))
        of_prompt[prompt].append(row)
        of_answer[prompt, row["chosen"].strip()].append((place, row))
        numbered[row["pair_id"]].setdefault(texts, place)
    for user, places in kinds.items():
        if len(places) == 2:
            problems["users trained on and adapted to"].append(f"{user}: {places['train']}, {places['adapt']}")
    for pair_id, places in numbered.items():
        if len(places) > 1:
            problems["one pair_id for different pairs"].append(f"{pair_id}: {', '.join(places.values())}")
    for same in of_pair.values():
        if len(same) > 1:
            _same_pair(same, problems, notes)
    # With few prompts for many pairs a response stands in several pairs; else it is what would have to be guessed.
    known = notes if len(of_prompt) < len(of_pair) / 2 else problems
    _rejected_before(good, known, notes)
    for same in of_answer.values():
        for user in {row["user_id"] for _, row in same} if len(same) > 1 else ():
            own = [(place, row["split"]) for place, row in same if row["user_id"] == user]
            if len({split for _, split in own}) > 1:
                places = f"{user}: " + ", ".join(place for place, _ in own)
                known["one answer to a prompt in two splits of a user"].append(places)
    for prompt, several in of_prompt.items():
        for one, other in combinations(sorted({row["split"] for row in several}), 2):
            notes[f"prompts in {one} and {other}"].append(prompt[:80])
    for same in of_answer.values():
        if {schema.kind_of(row) for _, row in same} == {"train", "adapt"}:
            places = ", ".join(place for place, _ in same)
            notes["answers of train users that are an adapt user's, to the same prompt"].append(places)


def _rejected_before(good, known, notes) -> None:
    """Held-out pairs whose rejected response the same user also rejects in training or support: half of the answer is known.

    With short replies a few occur by chance; from REPEATED percent on the set was made so.
    """
    of_response, count = defaultdict(lambda: defaultdict(list)), defaultdict(int)
    for place, row in good:
        # Compared as in mining; a text of signs alone stays as it is.
        text = normalized(row["rejected"]) or row["rejected"].strip()
        of_response[row["user_id"], text][row["split"]].append(place)
        count[row["split"]] += 1
    for held, other in (("query", "support"), ("train_test", "train")):
        shared = [(user, of[held], of[other]) for (user, _), of in of_response.items() if held in of and other in of]
        share = 100 * sum(len(places) for _, places, _ in shared) / max(1, count[held])
        kind = known if share >= REPEATED else notes
        for user, places, others in shared:
            for place in places:
                what = f"responses rejected in {held} that the same user rejects in {other}"
                kind[what].append(f"{user}: {place}, {others[0]}")


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
        notes["pairs of train users among the adapt users'"].append(places)
    elif {"train", "train_test"} <= splits and len(by_user) > 1:
        notes["pairs of one user's train in another's train_test"].append(places)
