"""What stands around a table's numbers: gaps that name their command, what is cut off, the decoder told from the reward."""

from __future__ import annotations

import re
import shlex

import cells as made
import pytest
from cells import row_of

from experiments import profiles
from experiments.tables import table
from experiments.tables.captions import makes, runs
from experiments.tables.render import MISSING, markdown
from experiments.tables.specs import GUIDES


def test_the_decoder_alone_is_told_from_the_reward(folder):
    found = table("9", folder)[0]
    (note,) = [note for note in found.notes if "weight 0 minus Zero-Shot" in note]
    rouge = {row: row_of(found, row)["rouge1"]["mean"] for row in ("ARGS, weight 0", "Zero-Shot", "ICL-RAG")}
    assert f": {rouge['ARGS, weight 0'] - rouge['Zero-Shot']:+.2f} [" in note and "+0.56 to +1.08" in note
    (note,) = [note for note in found.notes if "ICL-RAG minus the best guided row" in note]
    best = max(GUIDES, key=lambda row: row_of(found, row)["rouge1"]["mean"])
    gain = rouge["ICL-RAG"] - row_of(found, best)["rouge1"]["mean"]
    assert f"({best}), ROUGE-1: {gain:+.2f} [" in note and "the paper's: -1.45" in note


@pytest.mark.parametrize("name", ["5", "9"])
def test_rounding_is_measured_by_rows_that_do_not_guide(name, tmp_path):
    rows = [made.cell(row, dtype="bfloat16") for row in ("PReF", "LoRE", "ARGS, weight 0", "Zero-Shot")]
    rows[0]["values"] |= {"relative": 0}
    rows[0]["values"]["generations"]["same_as_zero_shot"] = 67.6
    rows[1]["values"] |= {"relative": 0.3}
    made.write(tmp_path, *rows)
    (note,) = [note for note in table(name, tmp_path)[0].notes if "rounding of bfloat16" in note]
    assert "(PReF, seed 0: 67.6 percent)" in note
    rows[0]["values"]["generations"]["same_as_zero_shot"] = 100.0
    made.write(tmp_path, *rows)
    assert not any("rounding" in note for note in table(name, tmp_path)[0].notes)
    rows[0]["values"]["generations"]["same_as_zero_shot"] = 67.6
    made.write(tmp_path, *(one | {"dtype": "float32"} for one in rows))
    assert not any("rounding" in note for note in table(name, tmp_path)[0].notes)


def test_a_missing_row_names_its_command(folder, tmp_path):
    rows = [row for row in made.ROWS if row not in ("Global RM-v2", "VPL")]
    made.write(tmp_path, *(made.cell(row) for row in rows))
    found, about = table("4", tmp_path)
    assert about["missing"] == ["Global RM-v2", "VPL"]
    assert row_of(found, "VPL")["rm_accuracy"] == row_of(found, "VPL")["weight"] == MISSING
    note, seeds = [note for note in found.notes if note.startswith("Missing")]
    assert "`python -m experiments reproduce cpu --only 'Global RM-v2' VPL --sets pref_lamp`" in note
    assert "LoRE (seeds 1, 2); " in seeds and "--only 'Global RM' LoRE " in seeds and "Zero-Shot" not in seeds
    assert row_of(found, "PAL").get("policy_accuracy") is None, "PAL can not guide: nothing is missing"
    assert any("paper.json" in note for note in found.notes)  # not beside these results
    text = markdown(found)
    assert text.count(MISSING) > 8 and "| VPL | —" in text


def test_a_row_that_the_profile_does_not_run_names_one_that_does(tmp_path):
    """Of what the command names every row has a cell, so that none is refused or left out."""
    sets = {"2": ("length_prefs", "TLDR"), "7": ("two_types", "PRISM")}
    for name, (own, data) in sets.items():
        made.write(tmp_path, made.cell("LoRE", set=own, stands_for=data))
        (note,) = [n for n in table(name, tmp_path)[0].notes if n.startswith("Missing") and "VPL" in n]
        for line in re.findall(r"`python -m experiments reproduce (.*?)`", note):
            profile, _, *words = shlex.split(line)
            rows, named = words[: words.index("--sets")], words[words.index("--sets") + 1 :]
            assert rows and set(rows) <= {cell["row"] for cell in profiles.planned(profile) if cell["set"] in named}
        assert ("paper --only P-DPO --sets tldr" in note) == (name == "2")
    assert makes("paper", ["LoRE", "Nobody"], ["prism"]) == (
        "`python -m experiments reproduce paper --only LoRE --sets prism`; "
        "no profile runs Nobody on these data (experiments/profiles.py)"
    )
    # Of data that a profile has no set for, or with rows that it does not run: the larger profile alone.
    unguided = makes("smoke", ["ARGS, weight 0"], (), "TLDR")
    assert (
        "`python -m experiments reproduce cpu --only 'ARGS, weight 0' --sets length_prefs` does" in unguided
        and "smoke --only" not in unguided
    )
    assert runs("smoke", ["ICL", "ICL, 2 shots"], (), "Pref-LaMP") == (["ICL"], ["synthetic"])


def test_a_missing_value_is_named(tmp_path):
    cell = made.cell("LoRE")
    del cell["values"]["generations"], cell["answers"]
    made.write(tmp_path, cell, made.cell("MPU"))
    found = table("9", tmp_path)[0]
    assert any(
        note.startswith("Missing: ROUGE-1; ROUGE-L; BERTScore-F1; perplexity; words; cut of LoRE.") for note in found.notes
    )


def test_cut_answers_are_said(tmp_path):
    cut, old, whole = made.cell("LoRE"), made.cell("MPU"), made.cell("VPL")
    cut["values"]["generations"]["cut"] = 60.0
    del old["values"]["generations"]["cut"]
    made.write(tmp_path, cut, old, whole)
    found = table("9", tmp_path)[0]
    assert row_of(found, "LoRE")["cut"]["mean"] == 60 and row_of(found, "MPU")["cut"] == MISSING
    assert any(note.startswith("More than half of the answers are cut off by the token limit: LoRE.") for note in found.notes)
