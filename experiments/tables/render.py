"""A table as data, and what it looks like in Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

MISSING = "\u2014"  # an em dash: the row should have this value, and no cell has it


class Column(NamedTuple):
    """key: name in CSV. parts: what is shown of a value, in CSV a column each (`mean` without a suffix); () for text."""

    key: str
    heading: str
    parts: tuple[str, ...] = ()
    digits: int = 2


OURS, PLAIN, PAPER = ("mean", "std", "low", "high", "n"), ("mean",), ("mean", "std")


@dataclass
class Table:
    """rows: for each row the values of the columns that it has, by key.

    A value is text, or a dict with (some of) the column's parts, or MISSING; a column that the row does not have stays empty.
    `below` are tables that belong to it, such as the correlations.
    """

    caption: str
    columns: list[Column]
    rows: list[dict]
    notes: list[str] = field(default_factory=list)
    below: list[Table] = field(default_factory=list)


def markdown(table: Table) -> str:
    clean = lambda text: text.replace("|", "\\|").replace("\n", " ")  # noqa: E731
    lines = [f"**{table.caption}**", ""]
    lines.append("| " + " | ".join(clean(column.heading) for column in table.columns) + " |")
    lines.append("|" + "".join("---|" if not column.parts else "---:|" for column in table.columns))
    for row in table.rows:
        lines.append("| " + " | ".join(clean(shown(row.get(c.key), c, "±", "–", "−")) for c in table.columns) + " |")
    lines.append("")
    lines += [line for note in table.notes for line in (f"- {note}",)]
    return "\n".join(lines).rstrip() + "\n" + "".join(f"\n{markdown(one)}" for one in table.below)


def latex(table: Table) -> str:
    """A table environment that needs the package booktabs and nothing else."""
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}[p]",
        r"\centering\scriptsize\setlength{\tabcolsep}{3pt}",
        rf"\caption{{{escape(table.caption)}}}",
        rf"\begin{{tabular}}{{{''.join('r' if column.parts else 'l' for column in table.columns)}}}",
        r"\toprule",
        " & ".join(escape(column.heading) for column in table.columns) + r" \\",
        r"\midrule",
    ]
    for row in table.rows:
        # in braces: a line that begins with [ would be read as the length that \\ takes
        lines.append(" & ".join(f"{{{escape(shown(row.get(c.key), c, '±', '–', '−'))}}}" for c in table.columns) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    if table.notes:
        lines.append(r"\par\smallskip\begin{minipage}{\linewidth}\raggedright")
        lines += [escape(note) + r"\par" for note in table.notes]
        lines.append(r"\end{minipage}")
    lines.append(r"\end{table}")
    return "\n".join(lines) + "\n" + "".join(f"\n{latex(one)}" for one in table.below)


def as_csv(table: Table) -> str:
    """Plain numbers in full, a column for each part of a value; no caption, no notes. Tables below follow an empty line."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([name for column in table.columns for name in _names(column)])
    for row in table.rows:
        writer.writerow([value for column in table.columns for value in _plain(row.get(column.key), column)])
    return out.getvalue() + "".join(f"\n{as_csv(one)}" for one in table.below)


FORMATS: dict[str, Callable[[Table], str]] = {"markdown": markdown, "latex": latex, "csv": as_csv}


def shown(value, column: Column, plus_minus: str, dash: str, minus: str) -> str:
    """95.29 ± 0.34 [93.10–97.06]; a negative bound is written with a real minus and "to"."""
    if value is None or isinstance(value, str):
        return value or ""
    if "mean" not in column.parts:  # one number for each seed: weights
        return ", ".join(f"{value[part]:g}" for part in column.parts if part in value)
    number = lambda one: _number(one, column.digits).replace("-", minus)  # noqa: E731
    text = "undefined" if value["mean"] is None else number(value["mean"])
    if "std" in column.parts and value.get("std") is not None:
        text += f" {plus_minus} {number(value['std'])}"
    if "low" in column.parts and value.get("low") is not None:
        between = " to " if value["low"] < 0 else dash
        text += f" [{number(value['low'])}{between}{number(value['high'])}]"
    return text


def escape(text: str) -> str:
    """Any text as LaTeX; what stands in backticks is set in typewriter."""
    words = text.split("`")
    return "".join(rf"\texttt{{{_escaped(word)}}}" if i % 2 else _escaped(word) for i, word in enumerate(words))


_SPECIAL = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "—": "---", "–": "--", "±": r"$\pm$",
    "−": "$-$", "∞": r"$\infty$", "≥": r"$\ge$", "≤": r"$\le$", "×": r"$\times$", "τ": r"$\tau$", "ρ": r"$\rho$",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
}  # fmt: skip


def _escaped(text: str) -> str:
    return "".join(_SPECIAL.get(letter, letter) for letter in text)


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "∞"


def _names(column: Column) -> list[str]:
    return [column.key if part == "mean" else f"{column.key}_{part}" for part in column.parts] or [column.key]


def _plain(value, column: Column) -> list:
    if not column.parts:
        return ["" if value in (None, MISSING) else value]
    if not isinstance(value, dict):  # missing, or not a value of this row
        return [""] * len(column.parts)
    return ["" if value.get(part) is None else value[part] for part in column.parts]
