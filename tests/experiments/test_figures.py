"""The paper's figures from made-up cells: drawn, the same bytes again, gaps that name their command, the tables' numbers."""

from __future__ import annotations

import json
import re

import cells as made
import pytest

from experiments.__main__ import main
from experiments.tables import table


@pytest.mark.parametrize("number", ["1", "2", "3"])
def test_figures_are_drawn(number, folder, tmp_path, capsys):
    for suffix in ("png", "svg"):
        out = tmp_path / f"figure.{suffix}"
        assert main(["figure", number, "--results", str(folder), "--out", str(out)]) == 0
        assert out.stat().st_size > 5000
        assert json.loads(capsys.readouterr().out)["missing"] == []
    first = out.read_bytes()
    assert main(["figure", number, "--results", str(folder), "--out", str(out)]) == 0
    assert out.read_bytes() == first, "the same cells give the same bytes"


def test_figures_of_little(tmp_path, capsys):
    made.write(tmp_path, made.cell("word overlap"))
    for number in "123":
        assert main(["figure", number, "--results", str(tmp_path), "--out", str(tmp_path / "f.png")]) == 1
        assert "python -m experiments reproduce cpu --only" in capsys.readouterr().err
    made.write(tmp_path, made.cell("LoRE"), made.cell("ICL"))
    for number in "123":
        assert main(["figure", number, "--results", str(tmp_path), "--out", str(tmp_path / "f.png")]) == 0
        assert json.loads(capsys.readouterr().out)["command"].startswith("python -m experiments reproduce cpu --only")
    # A row that one panel has and another lacks is missing.
    made.write(tmp_path, made.cell("VPL", set="length_prefs", stands_for="TLDR"))
    assert main(["figure", "1", "--results", str(tmp_path), "--out", str(tmp_path / "f.png")]) == 0
    missing = _figure_text(tmp_path)
    assert re.search(r"Missing: in length_prefs .*LoRE.*; in pref_lamp .*VPL", missing)
    assert "VPL" not in re.search(r"in length_prefs (.*?);", missing)[1], "what a panel shows is not missing there"
    assert {"LoRE", "VPL"} <= set(json.loads(capsys.readouterr().out)["missing"])
    assert main(["figure", "1", "--results", str(tmp_path), "--out", str(tmp_path / "f.pdf")]) == 1


def _figure_text(folder) -> str:
    from experiments.figures import figure

    return " ".join(figure("1", folder)[0].get_suptitle().split())


def test_figure_1_has_the_tables_correlations(folder):
    """Of PRISM too, where Table 7 has one query of each user."""
    from experiments.figures import figure

    drawn, _ = figure("1", folder)
    for data, name in (("TLDR", "2"), ("PRISM", "7")):
        (title,) = [t for axis in drawn.axes if data in (t := axis.get_title(loc="left"))]
        row = next(r for r in table(name, folder)[0].below[0].rows if r["statistic"] == "kendall")
        assert f"τ {row['points']['mean']:.2f} [{row['points']['low']:.2f}".replace("-", "−") in title
