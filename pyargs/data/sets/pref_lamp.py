"""Titles of scientific papers by author, in the format of LaMP-5: preference files over them, and the papers themselves.

The format is told in `pyargs.prepare.pref_lamp`, which makes pairs of the papers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pyargs.data import preferences, schema, sources
from pyargs.data.schema import normalized
from pyargs.errors import PyargsError

if TYPE_CHECKING:
    from datasets import Dataset


INSTRUCTION = "Generate a title for the following abstract of a paper: "
FILES = {"train": "train", "dev": "adapt"}  # name of the file -> kind of its users


def load(source: str | Path, *, train_test: float = 0.2, seed: int = 0) -> Dataset:
    """Pairs (prompt = instruction + abstract, chosen = the author's title, rejected = a title of a similar paper).

    `source` is a preference file, or a folder with exactly one file `prefs*.jsonl[.gz]`; its adapt users carry their
    own support and query rows. In a folder with questions, every pair is checked against its paper: prompt and
    chosen title must be the item's. Raises PyargsError.
    """
    source = sources.local(source)
    found = [source] if source.is_file() else sorted([*source.glob("prefs*.jsonl"), *source.glob("prefs*.jsonl.gz")])
    if len(found) != 1:
        what = ", ".join(path.name for path in found) or "none"
        raise PyargsError(
            f"{source}: found preference files {what}; give the path of one as the source, or make pairs with "
            "`pyargs data build pref_lamp` and give the built folder as --data."
        )
    pairs = preferences.load(found[0], train_test=train_test, seed=seed)
    folder = found[0].parent
    if any(_is_there(folder, f"{stem}_questions") for stem in FILES):
        papers = {item["item_id"]: item for item in items(folder)}
        for pair in pairs:
            paper = papers.get(pair["pair_id"])
            if paper is None or (paper["user_id"], paper["prompt"], paper["title"]) != (
                pair["user_id"],
                pair["prompt"],
                pair["chosen"],
            ):
                raise PyargsError(f"{found[0].name}: pair {pair['pair_id']} does not match the paper in the questions files.")
    return pairs


def items(source: str | Path) -> Dataset:
    """Every paper of every user: `user_id, item_id, prompt, title, date (str or null), role, user_split`.

    `date` is a year or an ISO date. `role` is "question" or "profile", `user_split` "train" or "adapt". The title of a
    question without an outputs file (the test files of LaMP) is null. Order: the files' own, each user's profile first and
    then the question.
    Raises PyargsError, naming file and row: not LaMP-5, a user or a user's paper twice, an empty title or abstract.
    """
    from datasets import Dataset

    folder, rows, users = sources.local(source), [], set()
    for stem, kind in FILES.items():
        if _is_there(folder, f"{stem}_questions"):
            path = sources.one_of(folder, f"{stem}_questions", ".json")
            golds = _golds(folder, stem)
            for number, question in enumerate(_list(path, sources.read_json(path)), 1):
                place = f"{path.name}, question {number}"
                papers = _papers(place, question, golds, f"{stem}_outputs.json", kind)
                if papers[0]["user_id"] in users:
                    raise PyargsError(f"{place}: the id {papers[0]['user_id']} is there twice.")
                users.add(papers[0]["user_id"])
                rows += papers
    if not rows:
        raise PyargsError(f"{folder}: no train_questions.json or dev_questions.json (plain or .gz).")
    return Dataset.from_list(rows)


def _is_there(folder: Path, stem: str) -> bool:
    return any((folder / f"{stem}{suffix}").is_file() for suffix in (".json", ".json.gz"))


def _list(path: Path, value) -> list:
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise PyargsError(f"{path.name}: not an array of objects: not LaMP-5.")
    return value


def _golds(folder: Path, stem: str) -> dict[str, str] | None:
    if not _is_there(folder, f"{stem}_outputs"):
        return None
    path = sources.one_of(folder, f"{stem}_outputs", ".json")
    value = sources.read_json(path)
    golds: dict[str, str] = {}
    for number, gold in enumerate(_list(path, value.get("golds") if isinstance(value, dict) else None), 1):
        key = str(gold.get("id"))
        if key in golds:
            raise PyargsError(f"{path.name}, gold {number}: the id {key} is there twice.")
        golds[key] = _title(gold.get("output"), f"{path.name}, gold {number} (id {key})", "output")
    return golds


def _papers(place: str, question: dict, golds: dict[str, str] | None, outputs: str, kind: str) -> list[dict]:
    """A user's profile, then the question."""
    user = _id(question, place)
    place = f"{place} (id {user})"
    prompt = schema.text(question.get("input"), place, "input")
    if not prompt.startswith(INSTRUCTION):
        raise PyargsError(f"{place} does not begin with '{INSTRUCTION}': not LaMP-5.")
    schema.text(prompt.removeprefix(INSTRUCTION), place, "abstract")
    if golds is not None and user not in golds:
        raise PyargsError(f"{place}: {outputs} has no output for it.")
    rows, seen = [], {user}
    for number, paper in enumerate(question.get("profile") or [], 1):
        entry = f"{place}, profile entry {number}"
        if not isinstance(paper, dict):
            raise PyargsError(f"{entry}: not a JSON object.")
        item = _id(paper, entry)
        if item in seen:
            raise PyargsError(f"{entry}: the id {item} is there twice.")
        seen.add(item)
        rows.append(
            {
                "user_id": user,
                "item_id": item,
                "prompt": INSTRUCTION + schema.text(paper.get("abstract"), entry, "abstract"),
                "title": _title(paper.get("title"), entry, "title"),
                "date": _date(paper.get("date"), entry),
                "role": "profile",
                "user_split": kind,
            }
        )
    title = None if golds is None else golds[user]
    rows.append(
        {
            "user_id": user,
            "item_id": user,
            "prompt": prompt,
            "title": title,
            "date": _date(question.get("date"), place),
            "role": "question",
            "user_split": kind,
        }
    )
    return rows


def _title(value, place: str, name: str) -> str:
    if not normalized(schema.text(value, place, name)):
        raise PyargsError(f"{place}: {name} is {value!r}, without a letter or digit.")
    return value


def _id(row: dict, place: str) -> str:
    if not isinstance(row.get("id"), (str, int)):
        raise PyargsError(f"{place}: the id is {row.get('id')!r}, not a string or a number.")
    return str(row["id"])


def _date(value, place: str) -> str | None:
    """A year or an ISO date, which sort as texts."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, (str, int))):
        raise PyargsError(f"{place}: date is {value!r}, not a year or a string.")
    return None if value is None else str(value)
