"""Titles of scientific papers by author, in the format of LaMP-5 (personalized scholarly title generation).

A folder holds `train_questions.json` and `dev_questions.json` (plain or .gz), each an array of `{"id", "input",
"profile": [{"id", "title", "abstract", "date"}]}`, and `*_outputs.json` with `{"task": "LaMP_5", "golds": [{"id",
"output"}]}`. One question is one user: the authors of `train` are trained on, those of `dev` adapted to. LaMP:
Salemi et al. 2023 (arXiv 2304.11406). Preference pairs come from a file in the common schema beside them.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING

from pyargs.data import preferences
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
    source = Path(source)
    found = [source] if source.is_file() else sorted([*source.glob("prefs*.jsonl"), *source.glob("prefs*.jsonl.gz")])
    if not source.exists():
        raise PyargsError(f"No file or folder {source}.")
    if len(found) != 1:
        what = ", ".join(path.name for path in found) or "none"
        raise PyargsError(f"{source}: found preference files {what}; give the path of one as the source.")
    pairs = preferences.load(found[0], train_test=train_test, seed=seed)
    folder = found[0].parent
    if _file(folder, "train_questions") or _file(folder, "dev_questions"):
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
    """Every paper of every user: `user_id, item_id, prompt, title, date (year, may be null), role, user_split`.

    `role` is "question" or "profile", `user_split` "train" or "adapt". The title of a question without an output
    (the test files of LaMP) is null. Order: the files' own, each user's profile first and then the question.
    """
    from datasets import Dataset

    folder, rows = Path(source), []
    for stem, user_split in FILES.items():
        questions = _file(folder, f"{stem}_questions")
        if questions is None:
            continue
        outputs = _file(folder, f"{stem}_outputs")
        golds = {gold["id"]: gold["output"] for gold in _json(outputs)["golds"]} if outputs else {}
        for question in _json(questions):
            user, common = str(question["id"]), {"user_id": str(question["id"]), "user_split": user_split}
            if not question["input"].startswith(INSTRUCTION):
                raise PyargsError(f"{questions.name}: question {user} does not begin with '{INSTRUCTION}': not LaMP-5.")
            for paper in question["profile"]:
                rows.append(
                    common
                    | {
                        "item_id": str(paper["id"]),
                        "prompt": INSTRUCTION + paper["abstract"],
                        "title": paper["title"],
                        "date": paper.get("date"),
                        "role": "profile",
                    }
                )
            rows.append(
                common
                | {
                    "item_id": user,
                    "prompt": question["input"],
                    "title": golds.get(question["id"]),
                    "date": question.get("date"),
                    "role": "question",
                }
            )
    if not rows:
        raise PyargsError(f"{folder}: no train_questions.json or dev_questions.json (plain or .gz).")
    return Dataset.from_list(rows)


def _file(folder: Path, stem: str) -> Path | None:
    return next((path for path in (folder / f"{stem}.json", folder / f"{stem}.json.gz") if path.is_file()), None)


def _json(path: Path):
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            return json.load(file)
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        raise PyargsError(f"{path.name} is damaged or not JSON: {error}") from None
