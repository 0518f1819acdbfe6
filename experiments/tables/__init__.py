"""The paper's Tables 1-12 made from cells: ours beside the paper's numbers, what is missing, and the command that makes it.

specs.py says what the tables hold, methods.py fills those with methods in their rows,
captions.py writes what stands around the numbers, render.py makes Markdown, LaTeX and CSV of them.
"""

from __future__ import annotations

from pathlib import Path

from experiments import results
from experiments.tables import captions
from experiments.tables.methods import correlations, methods, policies
from experiments.tables.render import MISSING, OURS, PLAIN, Column, Table
from experiments.tables.specs import ALONE, GUIDES, LORA, METRICS, SCALES, SCORERS, SPECS, has

NAMES = (*map(str, range(1, 13)), "same-content")


def table(name: str, folder: str | Path, profile: str | None = None) -> tuple[Table, dict]:
    """Table `name` of NAMES from the cells below `folder`, and {"profile", "missing": the rows that lack something}.

    profile: as in results.choose_profile. The paper's numbers are read from FOLDER/../expected/paper.json.
    """
    cells = results.read(folder)
    numbers, paper = results.of_paper(folder)
    if name == "same-content":
        profile = results.choose_profile([c for c in cells if c["set"] == "same_content"] or cells, None, profile)
        made, lacking = _same_content([c for c in cells if c["profile"] == profile and c["set"] == "same_content"], profile)
    elif name == "1":
        profile = results.choose_profile(cells, None, profile)
        made, lacking = _configurations([c for c in cells if c["profile"] == profile], paper, profile)
    else:
        spec = SPECS[name]
        profile = results.choose_profile(cells, spec.data, profile)
        cells = results.of_set(cells, profile, spec.data)
        made, lacking = (_with_rouge if name == "6" else methods)(name, spec, cells, paper, profile)
    if paper is None and name != "same-content":
        made.notes.append(
            f"The paper's columns are empty: there is no {numbers}; `python experiments/paper_numbers.py` makes it."
        )
    return made, {"profile": profile, "missing": lacking}


def _configurations(cells: list[dict], paper: dict | None, profile: str) -> tuple[Table, list[str]]:
    """Table 1: reward models and policies of each data set, and of our sets that stand for none."""
    columns = [
        Column("data", "data set"),
        Column("paper_reward_model", "paper: reward model"),
        Column("paper_policies", "paper: policies"),
        Column("ours", "ours"),
        Column("reward_model", "reward models"),
        Column("policies", "policies"),
        Column("seeds", "seeds", PLAIN, 0),
    ]
    extra = sorted({c["set"] for c in cells if c["stands_for"] is None})
    rows, lacking = [], []
    for data in (*SCALES, *extra):
        own = [c for c in cells if c["set"] == data and c["stands_for"] is None] if data in extra else None
        own = results.of_set(cells, profile, data) if own is None else own
        printed = paper["tables"]["1"].get(data, {}) if paper else {}
        row = {"data": data, "paper_reward_model": printed.get("reward_model"), "ours": MISSING}
        row["paper_policies"] = ", ".join(printed.get("base_policies", []))
        if own:
            row |= {
                "ours": " and ".join(sorted({c.get("data") or c["set"] for c in own})),
                "reward_model": _backbones(own),
                "policies": ", ".join(results.policies(own)),
                "seeds": {"mean": len({c["seed"] for c in own})},
            }
        else:
            lacking.append(data)
        rows.append(row)
    notes = [
        f"{data}: {printed['note']}."
        for data, printed in (paper or {"tables": {"1": {}}})["tables"]["1"].items()
        if "note" in printed
    ]
    if lacking:
        notes.append(f"Missing: cells for {captions.listed(lacking)}. {captions.makes_all(profile)}.")
    return Table(f"Table 1. Model configurations. Ours: profile {profile}.", columns, rows, notes), lacking


def _backbones(cells: list[dict]) -> str:
    """Name of the reward models' backbone, where the cells tell it, and whether it is trained."""
    frozen, trained = captions.backbones(cells)
    names = sorted({c["backbone"] for c in cells if c.get("backbone")})
    how = " or ".join(word for word, rows in (("frozen", frozen), ("LoRA", trained)) if rows)
    return ", ".join([*names, *([how] if how else [])])


def _with_rouge(name: str, spec, cells: list[dict], paper: dict | None, profile: str) -> tuple[Table, list[str]]:
    """Table 6: what predicts ROUGE-1."""
    beside = policies(spec, cells)
    caption = captions.caption(f"Table {name}. {spec.title}", cells, profile, spec.data, beside)
    made = correlations(caption, spec, cells, paper, statistics=("kendall",), digits=3)
    lacking = {row: [] for row in spec.over if not any(c["row"] == row for c in cells)}
    made.notes += captions.marked([], [c for c in cells if c["row"] in spec.over])[1]
    made.notes += captions.missing(lacking, spec.over, cells, profile, spec.data, beside)
    return made, sorted(lacking)


def _same_content(cells: list[dict], profile: str) -> tuple[Table, list[str]]:
    """Does anything beat Global RM where both titles are of the same abstract, so that content can not decide?"""
    keys = {"rm_accuracy": "RM acc.", "policy_accuracy_all": "policy acc. (all normalised)"}
    columns = [Column("row", "method")]
    for key, heading in keys.items():
        columns += [Column(key, heading, OURS), Column(f"{key}_gain", "minus Global RM", ("mean", "low", "high"))]
        columns += [Column("rm_ties", "ties", PLAIN)] if key == "rm_accuracy" else []
    columns += [Column("weight", "weights", tuple(f"seed_{s}" for s in sorted({c["seed"] for c in cells})))]
    columns += [Column("seeds", "seeds", PLAIN, 0)]
    policy = (results.policies(cells) or [None])[0]
    cells = [c for c in cells if c["policy"] == policy]
    there = {c["row"] for c in cells if " shots" not in c["row"]}
    heads = [*GUIDES[1:7], "PAL", *GUIDES[7:]]
    names = dict.fromkeys([*heads, *(row for row in ("GenARM", *LORA, *ALONE) if row in there), *SCORERS, *sorted(there)])
    rows, lacking, above = [], {}, {key: [] for key in keys}
    for name in names:
        own, row = [c for c in cells if c["row"] == name], {"row": name}
        rival = "Global RM, LoRA" if name in LORA else "Global RM"
        for key in (*keys, "rm_ties", "weight"):
            metric = METRICS[key]
            row[key] = results.summary(own, metric.measure)
            if row[key] is None and metric.needs in has(name):
                row[key] = MISSING
                lacking.setdefault(name, []).append(metric.heading)
            elif key == "weight" and row[key]:
                row[key] = {f"seed_{seed}": value for seed, value in row[key]["seeds"].items()}
        for key in keys:
            if name != rival and own:
                gain = results.difference(own, [c for c in cells if c["row"] == rival], METRICS[key].measure)
                row[f"{key}_gain"] = gain
                if gain and gain["low"] is not None and gain["low"] > 0:
                    above[key].append(name)
        row["seeds"] = {"mean": len({c["seed"] for c in own})} if own else None
        rows.append(row)
    notes = []
    if cells:
        for key, heading in keys.items():
            notes.append(f"{heading}: {captions.listed(above[key]) or 'nothing'} above Global RM beyond the 95% interval.")
        notes.append(
            f"{captions.counted(cells)}Mean ± sample std over seeds [95% interval over users]. Differences are paired over "
            "users, of LoRA rows with Global RM's LoRA row. Of rows that do not differ one in forty lies above. "
            f"{captions.WIDENED}"
        )
    column, marks = captions.marked(rows, cells)
    columns, notes = columns + column, notes + marks
    notes += captions.missing(lacking, names, cells, profile, None, {})
    title = "Where content can not decide: chosen and rejected are of the same prompt (not a table of the paper)"
    return Table(captions.caption(title, cells, profile, None, {}), columns, rows, notes), sorted(lacking)
