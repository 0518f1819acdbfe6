"""The report of an evaluation: one HTML file with the findings, figures, tables and answers of a profile's cells.

It holds numbers, ids and our own generations. The users' own texts get in only with the data set, in a report that one makes
for oneself.
"""

from __future__ import annotations

import base64
import io
import random
import re
from collections import Counter
from pathlib import Path
from statistics import quantiles

from experiments import profiles, results, rules
from experiments.claims import VERDICTS, findings
from experiments.claims.verdicts import LEAST, LEAST_SEEDS
from experiments.figures import figure
from experiments.tables import NAMES, table
from experiments.tables.captions import backbones, listed, with_seeds
from experiments.tables.render import shown
from experiments.tables.specs import FORMS, LAMP, LORA, METRICS, SCORERS, UNGUIDED
from pyargs import files
from pyargs.errors import PyargsError

ORDER = (*LAMP, *LORA, UNGUIDED, *SCORERS)
USERS, PROMPTS = 4, 2  # whose answers are shown, and how many of each
FIGURES = {
    "1": "RM accuracy against policy accuracy",
    "2": "Answers against what the user wrote",
    "3": "ROUGE-1 by demonstrations",
}


def report(folder: str | Path, profile: str | None = None, data=None) -> dict:
    """What the page shows, from the cells below `folder`. data: the data set (`pyargs.data.load`) whose texts may be shown.

    profile: as in results.choose_profile. Raises PyargsError without cells, and when `data` is not what the cells are made on.
    """
    every = results.read(folder)
    profile = results.choose_profile(every, None, profile)
    cells = [c for c in every if c["profile"] == profile]
    numbers, paper = results.of_paper(folder)
    judged = [] if paper is None else findings(cells, paper, profile)
    return {
        "profile": profile,
        "summary": _summary(cells),
        "grid": _grid(profile, cells),
        "findings": judged,
        "no_findings": "" if judged else f"There is no {numbers}; `python -m experiments.paper_numbers` makes it.",
        "verdicts": {verdict: sum(one["verdict"] == verdict for one in judged) for verdict in VERDICTS},
        "least": LEAST,
        "least_seeds": LEAST_SEEDS,
        "figures": [_figure(number, folder, profile) for number in FIGURES],
        "sets": [_charts(own) for own in _by_set(cells)],
        "tables": [table(one, folder, profile)[0] for one in NAMES],
        "answers": _answers(cells, data),
        "cells": [_line(cell) for cell in cells],
        "older": _older(cells),
    }


def write(path: str | Path, found: dict) -> None:
    """The page, in one file that needs nothing else."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    page = Environment(
        loader=PackageLoader("experiments", "."),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters |= {"code": _code, "number": _number, "folded": _folded, "listed": listed}
    page.globals["shown"] = lambda value, column: shown(value, column, "±", "–", "−")
    with files.writing(path) as temporary:
        temporary.write_text(page.get_template("report.html.j2").render(found), encoding="utf-8")


# --- what was run


def _summary(cells: list[dict]) -> dict:
    """Sets, seeds, hours, machines, versions and commits of the cells."""
    notes = [c.get("provenance") or {} for c in cells]
    hardware = [n.get("hardware") or {} for n in notes]
    versions = [n.get("versions") or {} for n in notes]
    words = [", ".join(filter(None, [h.get("gpu"), h.get("cpu"), _threads(h.get("threads"))])) for h in hardware]
    return {
        "cells": len(cells),
        "seeds": sorted({c["seed"] for c in cells}),
        "hours": sum(sum((c.get("seconds") or {}).values()) for c in cells) / 3600,
        "hardware": _distinct(words),
        "commits": _distinct([n.get("commit") or "" for n in notes]),
        "versions": _distinct([", ".join(f"{key} {value}" for key, value in v.items() if value) for v in versions]),
        "sets": [_about(own) for own in _by_set(cells)],
    }


def _threads(count: int | None) -> str:
    return "" if count is None else f"{count} thread{'s' * (count != 1)}"


def _about(cells: list[dict]) -> dict:
    """What one set is, which policies answer, and on what the reward models were trained."""
    dtypes = {
        p: sorted({c.get("dtype") or "dtype unknown" for c in cells if c["policy"] == p}) for p in results.policies(cells)
    }
    return {
        "set": cells[0]["set"],
        "stands_for": cells[0]["stands_for"],
        "cells": len(cells),
        "users": _users(cells),
        "about": " and ".join(sorted({c.get("data") or "" for c in cells})),
        "seeds": sorted({c["seed"] for c in cells}),
        "policies": [f"{policy} ({listed(found)})" for policy, found in dtypes.items()],
        "backbones": sorted({c["backbone"] for c in cells if c.get("backbone")}),
        "frozen": backbones(cells)[0],
        "lora": backbones(cells)[1],
    }


def _by_set(cells: list[dict]) -> list[list[dict]]:
    return [[c for c in cells if c["set"] == name] for name in dict.fromkeys(c["set"] for c in cells)]


def _users(cells: list[dict]) -> str:
    each = [c["values"]["rm_accuracy"]["each"] for c in cells if (c["values"].get("rm_accuracy") or {}).get("each")]
    return f"{len(each[0])} new users, {sum(map(len, each[0].values()))} pairs" if each else ""


def _distinct(words: list[str]) -> list[str]:
    """Each of the words once with how many cells have it, the most frequent first."""
    counts = Counter(word for word in words if word)
    return [f"{word} ({count} cells)" if len(counts) > 1 else word for word, count in counts.most_common()]


def _grid(profile: str, cells: list[dict]) -> dict:
    """How many cells the profile has to have, and which of them are not there, by set."""
    told, absent = profiles.planned(profile), profiles.absent(profile, cells)
    sets = dict.fromkeys(one["set"] for one in absent)
    missing = {name: with_seeds(profiles.seeds(one for one in absent if one["set"] == name)) for name in sets}
    return {
        "cells": len(told),
        "there": len(told) - len(absent),
        "command": results.command(profile),
        "missing": missing,
    }


# --- figures and charts


def _figure(number: str, folder: str | Path, profile: str) -> dict:
    """A figure of the paper as a data URL, or why there is none."""
    try:
        made, _ = figure(number, folder, profile)
    except PyargsError as error:
        return {"number": number, "title": FIGURES[number], "image": None, "error": str(error), "width": 0}
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    image = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {
        "number": number,
        "title": FIGURES[number],
        "image": image,
        "error": "",
        "width": int(96 * made.get_size_inches()[0]),
    }


def _charts(cells: list[dict]) -> dict:
    """Of one set, for each policy: every row's interval of ROUGE-1, and the users' own values of RM accuracy and ROUGE-1."""
    charts = []
    for policy in results.policies(cells):
        own = [c for c in cells if c["policy"] == policy]
        for key, heading in (("rm_accuracy", "RM accuracy, percent"), ("rouge1", "ROUGE-1")):
            rows = [line for row in _rows(own) if (line := _line_of_chart(own, row, METRICS[key].measure))]
            if rows and (key == "rouge1" or policy == results.policies(cells)[0]):
                highest = max(
                    value for line in rows for value in [line["mean"], line["high"] or 0, *(v for _, v in line["users"])]
                )
                end = 100 if key == "rm_accuracy" else max(10, -(-int(highest + 1) // 10) * 10)
                zero = next((line["mean"] for line in rows if line["row"] == "Zero-Shot"), None)
                charts.append(
                    {
                        "policy": policy,
                        "heading": heading,
                        "rows": rows,
                        "end": end,
                        "mark": 50 if end == 100 and key == "rm_accuracy" else zero,
                        "text": key == "rouge1",
                    }
                )
    return {"set": cells[0]["set"], "stands_for": cells[0]["stands_for"], "charts": charts}


def _rows(cells: list[dict]) -> list[str]:
    there = {c["row"] for c in cells}
    by_shots = sorted(
        there - set(ORDER), key=lambda row: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", row)]
    )
    return [*(row for row in ORDER if row in there), *by_shots]


def _line_of_chart(cells: list[dict], row: str, measure: results.Measure) -> dict | None:
    """A row's mean, its interval, its users' means over their pairs and seeds, and their quartiles."""
    own = [c for c in cells if c["row"] == row]
    found = results.summary(own, measure)
    if found is None:
        return None
    together = results.pooled(one for cell in own if (one := measure(cell)) is not None)
    users = [(user, sum(values) / len(values)) for user, values in sorted(together.items())]
    box = quantiles([value for _, value in users], n=4, method="inclusive") if len(users) > 1 else None
    return {"row": row, **{key: found[key] for key in ("mean", "low", "high", "n")}, "users": users, "box": box}


def _line(cell: dict) -> dict:
    """A cell in the list at the end: its file and its main numbers."""
    measures = ("rm_accuracy", *FORMS, "rouge1")
    found = {key: one["value"] if (one := METRICS[key].measure(cell)) else None for key in measures}
    return {
        "file": results.name(cell),
        **found,
        "weight": cell["values"].get("relative"),
        "older": [rule.number for rule in rules.older(cell)],
        "commit": (cell.get("provenance") or {}).get("commit"),
    }


def _older(cells: list[dict]) -> list[dict]:
    """The rules that came after some of the cells, with these cells' files."""
    behind = {rule: [results.name(cell) for cell in cells if rule in rules.older(cell)] for rule in rules.RULES}
    return [{"number": rule.number, "before": rule.before, "files": files} for rule, files in behind.items() if files]


# --- answers


def _answers(cells: list[dict], data) -> list[dict]:
    """Some users' prompts of each set with what every row generated (the largest policy, first seed), the same texts together.

    With the data set, each has the prompt and the user's own text.
    """
    found = []
    for own in _by_set(cells):
        policy = next(
            (p for p in reversed(results.policies(own)) if any(c["policy"] == p and c.get("answers") for c in own)), None
        )
        first = {
            row: next((c for c in own if c["row"] == row and c["policy"] == policy and c.get("answers")), None)
            for row in _rows(own)
        }
        first = {row: cell for row, cell in first.items() if cell}
        if not first:
            continue
        texts = {row: {(a["user_id"], a["pair_id"]): a for a in cell["answers"]} for row, cell in first.items()}
        of_user: dict[str, list[str]] = {}
        for user, pair in sorted({key for answers in texts.values() for key in answers}):
            of_user.setdefault(user, []).append(pair)
        draw = random.Random(0)
        users = sorted(draw.sample(sorted(of_user), min(USERS, len(of_user))))
        keys = [
            (user, pair) for user in users for pair in sorted(draw.sample(of_user[user], min(PROMPTS, len(of_user[user]))))
        ]
        originals = {} if data is None else _originals(own, data, keys)
        if data is None or originals:
            found.append(
                {
                    "set": own[0]["set"],
                    "policy": policy,
                    "files": [results.name(cell) for cell in first.values()],
                    "prompts": [_prompt(key, texts, originals) for key in keys],
                }
            )
    if data is not None and not found:
        sets = listed(sorted({c["set"] for c in cells if c.get("answers")})) or "none"
        raise PyargsError(
            f"the data given are not those of these cells (sets with answers: {sets}): give the same --data, "
            "--source and --data-seed as `pyargs evaluate`, or leave --data out"
        )
    return found


def _copied(answer: dict, prompt: str) -> tuple[int, int]:
    """The longest run of words that the answer has from the prompt (as noted where its text is left out), and how many."""
    from pyargs.metrics.overlap import copied

    return (answer["copied"], answer["words"]) if answer["text"] is None else copied(answer["text"], [prompt])


def _prompt(key: tuple[str, str], texts: dict[str, dict], originals: dict) -> dict:
    same: list[tuple[dict, list[str]]] = []  # an answer, and the rows that gave it
    for row, answers in texts.items():
        if key in answers:
            rows = next((rows for answer, rows in same if results.same_text(answer, answers[key])), None)
            if rows is None:
                same.append((answers[key], [row]))
            else:
                rows.append(row)
    original = originals.get(key)
    prompt = None
    if original:
        from pyargs.models.demonstrations import last_user_text

        prompt = last_user_text(original["prompt"])
    return {
        "user": key[0],
        "pair": key[1],
        "prompt": prompt,
        "original": original["chosen"] if original else None,
        "texts": [
            {
                "rows": rows,
                "rouge1": answer.get("rouge1"),
                "text": answer["text"],
                "left_out": answer.get("copied"),
                "copied": None if prompt is None else _copied(answer, prompt),
            }
            for answer, rows in same
        ],
    }


def _originals(cells: list[dict], data, keys: list[tuple[str, str]]) -> dict:
    """The rows of the data set that these prompts are; none if it is another data set."""
    from pyargs.data import content_hash, of_split

    noted = {(c.get("key") or {}).get("data") for c in cells} - {None}
    if noted and content_hash(data) not in noted:
        return {}
    wanted, rows = set(keys), of_split(data, "query")
    found = {}
    for number, key in enumerate(zip(rows["user_id"], rows["pair_id"], strict=True)):
        if key in wanted:
            found[key] = rows[number]
    return found if len(found) == len(wanted) else {}


# --- filters of the template


def _code(text: str):
    """Text with what stands in backticks as code."""
    from markupsafe import Markup, escape

    words = text.split("`")
    return Markup("").join(Markup("<code>{}</code>").format(word) if i % 2 else escape(word) for i, word in enumerate(words))


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}".replace("-", "−")


def _folded(names: list[str]) -> list[str]:
    """Files of one folder in one line: cpu/set/policy/: lore-0, lore-1."""
    folders: dict[str, list[str]] = {}
    for one in names:
        folder, _, file = one.rpartition("/")
        folders.setdefault(folder, []).append(file.removesuffix(".json"))
    return [f"{folder}/: {', '.join(own)}" for folder, own in folders.items()]
