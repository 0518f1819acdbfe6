"""A built set on disk: one parquet file for each split, a card, and dataset.json with counts, hashes and findings.

`datasets.load_dataset(FOLDER)` reads it, `pyargs` takes the folder as --data, and it can go to a hub as it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pyargs import data, files
from pyargs.data import schema
from pyargs.prepare.check import report
from pyargs.prepare.statistics import statistics


class Built(NamedTuple):
    """What a data set's `build` returns: the rows, with counts and notes about them.

    rows: dictionaries with the columns of `pyargs.data` and any more; counts: what was read, kept and dropped; notes:
    sentences for the card; sources: the files that were read.
    """

    rows: list[dict]
    counts: dict[str, object]
    notes: list[str]
    sources: list[Path]


def write(out: str | Path, built: Built, *, title: str, about: str, licence: str, how: dict, embedder: str | None) -> dict:
    """Writes the folder, completely or not at all, and returns the content of dataset.json. Rows are checked again.

    title, about, licence: for the card; how: the settings of the build; embedder: of the blind cosine, None leaves it out.
    Raises PyargsError for rows that `schema.checked` refuses.
    """
    dataset = schema.to_dataset(schema.checked(built.rows, where=title))
    splits = {split: [row for row in built.rows if row["split"] == split] for split in data.SPLITS}
    splits = {split: rows for split, rows in splits.items() if rows}
    base = Path(os.path.commonpath([path.parent for path in built.sources]))
    places = (
        (f"{split}.parquet, row {number}", row) for split in data.SPLITS for number, row in enumerate(splits.get(split, ()), 1)
    )
    found = {
        "name": title,
        "how": how,
        "counts": built.counts,
        "notes": built.notes,
        "sources": {path.relative_to(base).as_posix(): files.sha256(path) for path in built.sources},
        "statistics": statistics(dataset),
        "check": report(places, embedder=embedder),
    }
    with files.writing(out) as folder:
        folder.mkdir()
        for split, rows in splits.items():
            _parquet(folder / f"{split}.parquet", rows)
        found["files"] = {path.name: files.sha256(path) for path in sorted(folder.iterdir())}
        found["provenance"] = files.provenance(how.get("seed"))
        (folder / "README.md").write_text(card(found, about, licence, splits), encoding="utf-8")
        files.write_json(folder / "dataset.json", found)
    return found


def _parquet(path: Path, rows: list[dict]) -> None:
    import pyarrow
    import pyarrow.parquet

    names = [*data.COLUMNS, *(name for name in rows[0] if name not in data.COLUMNS)]
    pyarrow.parquet.write_table(pyarrow.table({name: [row.get(name) for row in rows] for name in names}), path)


def card(found: dict, about: str, licence: str, splits: Iterable[str]) -> str:
    """The README.md of a built set: its header makes the folder a data set of the hub."""
    numbers, checked = found["statistics"], found["check"]
    of_split = [
        [split, s["pairs"], s["users"], *(s["pairs_per_user"][key] for key in ("min", "median", "mean", "max"))]
        for split, s in numbers["splits"].items()
    ]
    lengths = [[name, *(s[key] for key in ("min", "median", "mean", "max"))] for name, s in numbers["words"].items()]
    blind = [[name, s["accuracy"], s["reversed"], s["tie_rate"], s["n"]] for name, s in checked["blind"].items()]
    best = max(checked["blind"].items(), key=lambda item: max(item[1]["accuracy"], item[1]["reversed"]))
    reached = max(best[1]["accuracy"], best[1]["reversed"])
    findings = [f"- **{name}**: {f['count']} ({'; '.join(f['first'])})" for name, f in checked["problems"].items()]
    return "\n".join([
        "---", "configs:", "- config_name: default", "  data_files:",
        *(f"  - split: {split}\n    path: {split}.parquet" for split in splits), "---", "",
        f"# {found['name']}", "", about, "", f"Licence: {licence}", "",
        "## Splits", "", *_table(["split", "pairs", "users", "min per user", "median", "mean", "max"], of_split), "",
        f"{numbers['different_pairs']} different pairs (prompt and two responses) of {numbers['prompts']} prompts; users per "
        f"pair: mean {numbers['users_per_pair']['mean']}, at most {numbers['users_per_pair']['max']}.", "",
        *_table(["words", "min", "median", "mean", "max"], lengths), "",
        "## What scorers reach that do not know the user", "",
        f"`{best[0]}` alone decides {reached}% of the pairs. A method that is not above this has learned nothing about users "
        "that the pairs' making does not give away. Accuracies in percent; a tie is an error.", "",
        *_table(["scorer", "more is better", "less is better", "ties", "pairs"], blind), "",
        "## How it was built", "", *(f"- {name}: {value}" for name, value in found["how"].items()), "",
        *(f"- {name}: {value}" for name, value in found["counts"].items()), "",
        *(f"- {note}" for note in found["notes"]), "",
        "## Check", "", *(findings or ["No problem found."]), "",
        *(f"- {name}: {f['count']}" for name, f in checked["notes"].items()), "",
        "## Sources (SHA-256)", "", *(f"- {name}: `{value}`" for name, value in found["sources"].items()), "",
    ])  # fmt: skip


def _table(head: list[str], rows: list[list]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]
