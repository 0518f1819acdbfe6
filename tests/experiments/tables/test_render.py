"""Tables in Markdown, LaTeX and CSV: formats that parse."""

from __future__ import annotations

import csv
import io
import re

from cells import printed
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.tables import NAMES, table
from experiments.tables.render import MISSING, OURS, Column, Table, escape, latex, markdown


def test_csv_parses_back_to_the_numbers(folder, capsys):
    text = printed(9, "--results", folder, "--format", "csv", capsys=capsys)
    main, below = text.split("\n\n")
    rows = {row["row"]: row for row in csv.DictReader(io.StringIO(main))}
    found = table("9", folder)[0]
    for row in found.rows:
        for column in found.columns:
            value = row.get(column.key)
            if isinstance(value, dict):
                for part in column.parts:
                    name = column.key if part == "mean" else f"{column.key}_{part}"
                    given = rows[row["row"]][name]
                    assert (float(given) if given else None) == value.get(part)
    assert not re.search("[±—–−]", text)
    assert "—" not in printed(2, "--results", folder, "--format", "csv", capsys=capsys)  # with policies that are missing
    assert {row["statistic"] for row in csv.DictReader(io.StringIO(below))} == {"kendall", "spearman", "pearson"}


SPECIAL = st.text(alphabet=st.sampled_from(list("ab \\&%$#_{}~^<>|—–±−[]\"'*")), max_size=12)


@settings(deadline=None)
@given(SPECIAL, SPECIAL)
def test_latex_is_escaped(caption, cell):
    made_table = Table(
        caption,
        [Column("row", cell), Column("x", "x_1", OURS)],
        [{"row": cell, "x": {"mean": 1.0, "low": -1.0, "high": 2.0, "std": None}}, {"row": "no value", "x": MISSING}],
        [cell],
    )
    text = latex(made_table)
    body = re.sub(r"\\[&%$#_{}\\]|\\[a-zA-Z]+", "", text)  # without escapes and commands
    depth = 0
    for letter in body:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        assert depth >= 0
    assert depth == 0 and body.count("$") % 2 == 0
    assert not re.search(r"[—–±−]", text) and "#" not in body and "~" not in body and "_" not in body
    lines = text.split("\\midrule")[1].split("\\bottomrule")[0].strip().splitlines()
    assert len(lines) == 2 and all(line.endswith("\\\\") and line.startswith("{") for line in lines)
    assert escape("100% of a_b & `x_y`") == r"100\% of a\_b \& \texttt{x\_y}"


def test_markdown_rows_have_all_columns(folder):
    for name in NAMES:
        for one in (found := table(name, folder)[0], *found.below):
            lines = [line for line in markdown(Table("c", one.columns, one.rows)).splitlines() if line.startswith("|")]
            assert {line.count("|") for line in lines} == {len(one.columns) + 1}
            assert len(lines) == len(one.rows) + 2
    odd = Table("c", [Column("row", "a|b"), Column("x", "c")], [{"row": "one|two\nthree", "x": MISSING}])
    assert markdown(odd).splitlines()[2:5] == ["| a\\|b | c |", "|---|---|", "| one\\|two three | — |"]
