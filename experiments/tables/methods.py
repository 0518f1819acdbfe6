"""Tables with methods in their rows, and the correlations of what stands in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from experiments import results
from experiments.tables import captions
from experiments.tables.render import MISSING, PAPER, PLAIN, Column, Table
from experiments.tables.specs import (
    ACCURACIES,
    ALONE,
    LORA,
    METRICS,
    OWN_POLICY,
    SCALES,
    SCORERS,
    SHARED,
    UNGUIDED,
    Metric,
    Spec,
    has,
)
from pyargs.metrics.correlation import STATISTICS, correlate_methods


class Slot(NamedTuple):
    """One column and where its values come from: our cells of a policy, or the paper's column of that name.

    policy: None where we have none; "any" for what is of the reward model alone.
    """

    column: Column
    metric: Metric
    measure: results.Measure
    policy: str | None = None
    printed: str | None = None


def methods(name: str, spec: Spec, cells: list[dict], paper: dict | None, profile: str) -> tuple[Table, list[str]]:
    """The table and the rows that lack a value. cells: those of the set; paper: the file of the paper's numbers, if there."""
    beside = policies(spec, cells)
    slots = _slots(spec, beside, sorted({c["seed"] for c in cells}))
    printed = paper["tables"][name] if paper else {}
    rows, lacking = [], {}
    for row in _rows(spec, cells):
        own = [c for c in cells if c["row"] == row]
        found = {slot.column.key: _value(slot, row, own, printed.get(row, {})) for slot in slots}
        if lacks := [slot.column.heading for slot in slots if found[slot.column.key] == MISSING]:
            lacking[row] = lacks
        rows.append({"row": row, **found, "seeds": _seeds(found)})
    columns = [Column("row", "method"), *(slot.column for slot in slots), Column("seeds", "seeds")]
    shown = [c for c in cells if c["policy"] in beside.values() or c["row"] == OWN_POLICY] if beside else cells
    notes = captions.reading(spec, shown)
    if "rouge1" in spec.metrics:
        for scale, policy in beside.items():
            notes += captions.controls([c for c in cells if c["policy"] == policy], paper, scale)
    notes += captions.missing(lacking, [row["row"] for row in rows], cells, profile, spec.data, beside)
    own = results.policies(cells)[:1]  # whose cells tell what a reward model ranks, whatever policy the table is about
    ranked = [c for c in cells if c["policy"] in own and results.rm_accuracy(c)] if "rm_accuracy" in spec.metrics else []
    column, marks = captions.marked(rows, shown if set(spec.metrics) - set(SHARED) else [], ranked)
    columns, notes = columns + column, notes + marks
    caption = captions.caption(f"Table {name}. {spec.title}", cells, profile, spec.data, beside)
    table = Table(caption, columns, rows, notes)
    if spec.pairs:
        table.below.append(correlations("Correlations over the methods.", spec, cells, paper))
    return table, sorted(lacking)


def policies(spec: Spec, cells: list[dict]) -> dict[str, str | None]:
    """Which of our policies stands beside each of the paper's that the table shows."""
    own = results.policies(cells)
    beside = results.match(SCALES[spec.data], own)
    if spec.nearest and own:
        return {scale: beside[scale] or own[-1] for scale in spec.scales}
    return {scale: beside[scale] for scale in spec.scales}


def correlations(
    caption: str, spec: Spec, cells: list[dict], paper: dict | None, statistics: Sequence[str] = STATISTICS, digits: int = 2
) -> Table:
    """Over points of method x seed and over the methods' means, for each policy and pair of measures of the spec."""
    parts = ("mean", "low", "high")
    columns = [
        Column("policy", "policy"),
        Column("paper_policy", "paper's"),
        Column("x", "of"),
        Column("y", "with"),
        Column("statistic", "statistic"),
        Column("points", "method x seed", parts, digits),
        Column("points_n", "points", PLAIN, 0),
        Column("means", "methods' means", parts, digits),
        Column("means_n", "methods", PLAIN, 0),
        Column("paper", "paper"),
    ]
    rows = []
    for scale, policy in policies(spec, cells).items():
        printed = ((paper or {}).get("correlations") or {}).get(spec.printed, {})
        printed = printed.get(scale) or printed.get("all") or {}
        for x, y in spec.pairs:
            values = printed.get(f"{x} ~ {y}", {})
            own = [c for c in cells if c["policy"] == policy]
            points = results.points(own, spec.over, _measure(spec, x), _measure(spec, y))
            found = correlate_methods(points)
            for statistic in statistics if points else [name for name in statistics if name in values]:
                row = {"policy": policy or MISSING, "paper_policy": scale, "x": METRICS[x].heading, "y": METRICS[y].heading}
                row |= {"statistic": statistic, "paper": captions.number_or_range(values.get(statistic))}
                for kind in ("points", "means"):
                    one = found[kind][statistic]
                    row[kind] = {"mean": one["value"], "low": one["low"], "high": one["high"]} if points else MISSING
                    row[f"{kind}_n"] = {"mean": found[kind]["n"]}
                rows.append(row)
    return Table(caption, columns, rows, captions.correlation_notes(spec, cells))


def _slots(spec: Spec, beside: dict[str, str | None], seeds: list[int]) -> list[Slot]:
    found = []
    for key in spec.metrics:
        if key in SHARED:
            found += _pair(spec, key, seeds, "", "any")
    for scale, policy in beside.items():
        for key in spec.metrics:
            if key not in SHARED:
                slots = _pair(spec, key, seeds, scale, policy, several=len(beside) > 1)
                # a policy that we do not have, one of several: the paper's numbers alone
                found += slots if policy or len(beside) == 1 else slots[1:]
    return found


def _pair(spec: Spec, key: str, seeds: list[int], scale: str, policy: str | None, several: bool = False) -> list[Slot]:
    """Our column of a measure and, where the paper has one, the paper's."""
    metric = METRICS[key]
    suffix, where = (f"_{policy or scale}", f"{policy or scale}: ") if several else ("", "")
    parts = metric.parts or tuple(f"seed_{seed}" for seed in seeds)
    measure = _measure(spec, key)
    found = [Slot(Column(key + suffix, where + metric.heading, parts, metric.digits), metric, measure, policy)]
    if metric.paper is not None:
        suffix, where = (f"_{scale}", f" {scale}") if several else ("", "")
        heading = f"paper{where}: {metric.heading.split(' (')[0]}"
        found.append(
            Slot(Column(f"paper_{key}{suffix}", heading, PAPER), metric, measure, printed=f"{metric.paper} {scale}".strip())
        )
    return found


def _measure(spec: Spec, key: str) -> results.Measure:
    measure = METRICS[key].measure
    return results.one_per_user(measure) if spec.subset and key in ACCURACIES else measure


def _value(slot: Slot, row: str, own: list[dict], printed: dict):
    if slot.printed is not None:
        number = printed.get(slot.printed)
        return dict(zip(PAPER, number, strict=True)) if number else None
    policy = "any" if row == OWN_POLICY else slot.policy
    if policy == "any":  # the cells are in the order of their policies: the smallest that has it
        policy = next((c["policy"] for c in own if slot.measure(c) is not None), None)
    found = results.summary([c for c in own if c["policy"] == policy], slot.measure)
    if found is None:
        return MISSING if slot.metric.needs in has(row) else None
    return found if slot.metric.parts else {"n": found["n"]} | {f"seed_{seed}": v for seed, v in found["seeds"].items()}


def _seeds(values: dict) -> str:
    """How many seeds are behind a row: "3", or "1 to 3" where its values have different numbers of them."""
    counts = sorted({one["n"] for one in values.values() if isinstance(one, dict) and "n" in one})
    return "" if not counts else f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _rows(spec: Spec, cells: list[dict]) -> list[str]:
    """The paper's rows, then ours: the controls, and whatever else has cells (but the rows by shots)."""
    needed = {METRICS[key].needs for key in spec.metrics}
    there = {c["row"] for c in cells if " shots" not in c["row"]}
    extra = [*(row for row in (*LORA, *ALONE) if row in there), UNGUIDED, *SCORERS, *sorted(there)]
    return list(dict.fromkeys([*spec.rows, *(row for row in extra if needed & has(row))]))
