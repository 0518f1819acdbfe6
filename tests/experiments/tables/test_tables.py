"""Every table stands, from a full set of made-up cells or a single one; rows are compared only where that is fair."""

from __future__ import annotations

import re

import cells as made
import pytest
from cells import ROOT, row_of

from experiments.tables import NAMES, table
from experiments.tables.render import MISSING, as_csv, latex, markdown
from experiments.tables.specs import SPECS
from pyargs import files
from pyargs.errors import PyargsError


def test_same_content_compares_with_global_rm(folder):
    found = table("same-content", folder)[0]
    own, rival = row_of(found, "MPU-Avg"), row_of(found, "Global RM")
    gain = own["rm_accuracy_gain"]
    assert gain["mean"] == pytest.approx(own["rm_accuracy"]["mean"] - rival["rm_accuracy"]["mean"])
    assert gain["low"] <= gain["mean"] <= gain["high"] and "rm_accuracy_gain" not in rival
    trained = [row_of(found, row)["rm_accuracy"]["mean"] for row in ("LoRE, LoRA", "Global RM, LoRA")]
    assert row_of(found, "LoRE, LoRA")["rm_accuracy_gain"]["mean"] == pytest.approx(trained[0] - trained[1])
    above = next(note for note in found.notes if note.startswith("RM acc."))
    for row in found.rows:
        if row.get("rm_accuracy_gain"):
            name = f'"{row["row"]}"' if "," in row["row"] else row["row"]
            listed = re.search(rf"(^|: |, | and ){re.escape(name)}(,| and| above)", above)
            assert bool(listed) == (row["rm_accuracy_gain"]["low"] > 0), row["row"]


def test_rows_of_other_users_are_not_compared(tmp_path):
    other = made.cell("Global RM", set="same_content", stands_for=None)
    other["values"]["rm_accuracy"] = made.accuracy({"someone": "10"})
    made.write(tmp_path, made.cell("LoRE", set="same_content", stands_for=None), other)
    with pytest.raises(PyargsError, match=r"LoRE .* and Global RM .* have different users"):
        table("same-content", tmp_path)


def test_rows_of_other_pairs_are_not_compared(tmp_path):
    """The same users, one of them with another pair more."""
    other = made.cell("Global RM", set="same_content", stands_for=None)
    each = other["values"]["rm_accuracy"]["each"]
    other["values"]["rm_accuracy"] = made.accuracy(each | {"user 0": each["user 0"] + "1"})
    made.write(tmp_path, made.cell("LoRE", set="same_content", stands_for=None), other)
    with pytest.raises(PyargsError, match=r"LoRE .* and Global RM .* have different pairs"):
        table("same-content", tmp_path)


def test_a_set_that_is_not_there(folder):
    found, about = table("2", folder, "smoke")
    assert about["profile"] == "smoke" and row_of(found, "LoRE")["rm_accuracy"] == MISSING
    assert row_of(found, "LoRE")["paper_rm_accuracy"]["mean"] == 82.56
    assert any("`python -m experiments reproduce smoke`" in note for note in found.notes)


@pytest.mark.parametrize("name", NAMES)
def test_every_table_stands_on_a_single_cell(name, tmp_path):
    """Whatever is missing, all formats can be made, without nan."""
    made.write(tmp_path, made.cell("LoRE"))
    found, _ = table(name, tmp_path)
    for form in (markdown, latex, as_csv):
        assert not re.search(r"\bnan\b|None", form(found))


@pytest.mark.parametrize("name", NAMES)
def test_a_full_table_misses_no_row_of_the_paper(name, folder):
    found, about = table(name, folder)
    printed = files.read_json(ROOT / "experiments/expected/paper.json")["tables"].get(name, {})
    if name not in ("1", "6", "same-content"):
        assert [row["row"] for row in found.rows][: len(printed)] == list(printed), "in the paper's order"
        assert bool(about["missing"]) == (name in ("10", "11", "12")), "one policy, beside the smallest"
        assert {"word overlap", "MiniLM cosine"} <= {row["row"] for row in found.rows} or name == "5"
    said = found.caption
    assert said.endswith(".")
    assert "profile cpu" in said and (name in ("1",) or "pref_lamp_like/ci" in said)
    if name in SPECS:
        assert f"stands in for the paper's {SPECS[name].data}" in said and "frozen" in said


def test_two_sets_for_one_are_an_error(tmp_path):
    made.write(tmp_path, made.cell("LoRE"), made.cell("LoRE", set="other"))
    with pytest.raises(PyargsError, match="several sets for Pref-LaMP: other, pref_lamp"):
        table("4", tmp_path)


@pytest.mark.parametrize("text", ["{}", "[]", '{"tables": {}}', '{"tables": {"1": {}}}'])
def test_paper_numbers_that_are_none(text, tmp_path):
    made.write(tmp_path / "results", made.cell("MPU"))
    (tmp_path / "expected").mkdir()
    (tmp_path / "expected/paper.json").write_text(text)
    with pytest.raises(PyargsError, match="does not hold the paper's tables"):
        table("9", tmp_path / "results")


def test_infinite_perplexity_is_a_result(tmp_path):
    """All answers empty: a weight that broke the policy, not a broken file."""
    cell = made.cell("LoRE")
    cell["values"]["generations"]["perplexity"] = float("inf")
    made.write(tmp_path, cell, made.cell("LoRE", 1))
    assert "∞" in markdown(table("9", tmp_path)[0])
