"""Cells made by older rules are marked wherever they are shown, and nothing is said of those that no later rule touches."""

from __future__ import annotations

import cells as made
import pytest

from experiments import report, results, rules
from experiments.figures import figure
from experiments.tables import table
from experiments.tables.render import as_csv, latex, markdown

COMMITTED = made.EXPERIMENTS / "results"


BIASES = next(rule for rule in rules.RULES if "VPL" in rule.before)


def cell(row: str, recipe: int = rules.NEWEST, seed: int = 0, **other) -> dict:
    """A made-up cell of a set that no rule is about, unless `other` says which."""
    one = made.cell(row, seed, **{"set": "titles", **other})
    return one | {"key": one["key"] | {"recipe": recipe}}


def test_rules_are_numbered_and_each_touches_some_cells_that_came_with_the_project():
    numbers = [rule.number for rule in rules.RULES]
    assert numbers == sorted(set(numbers)) and numbers[-1] == rules.NEWEST
    there = results.read(COMMITTED)
    there += [{"row": "PAL-A", "set": "persona_statements", "method": "pal", "fields": {"variant": "A"}, "values": {}}]
    for rule in rules.RULES:
        assert 0 < sum(map(rule.touches, there)) < len(there), rule.before
    assert any(rules.hardly_adapted(one) for one in there)


@pytest.mark.parametrize(
    ("chosen", "perplexity", "largest", "older"),
    [(1, None, False, False), (3, None, True, True), (3, 1.4, True, True), (3, 9.0, True, False), (0, None, False, False)],
)
def test_a_choice_at_the_end_of_the_grid(chosen, perplexity, largest, older):
    grid = [{"relative": weight} for weight in (0, 1, 3)]
    grid[-1] |= {} if perplexity is None else {"perplexity": perplexity}
    tune = {"grid": grid, "max_perplexity": 1.5, "unguided_perplexity": 1.0}
    one = cell("LoRE", 2, tune=tune)
    one["values"]["relative"] = chosen
    assert rules.largest_tried(one) == largest and bool(rules.older(one)) == older, "larger weights would be tried now, or not"
    said = rules.marks([one])
    assert len(said) == largest, "one mark is enough"
    new = one | {"key": one["key"] | {"recipe": rules.NEWEST}}
    assert list(rules.marks([new])) == ["the chosen weight is the largest tried"] * largest and not rules.older(new)


@pytest.mark.parametrize(
    ("chosen", "values", "marked"),
    [
        (3, {9: 70}, True),
        (3, {9: 50}, False),
        (3, {9: 60}, False),
        (1, {3: 50}, False),
        (3, {}, False),
        (0, {}, False),
        (3, {9: None}, False),
    ],
)
def test_a_choice_that_the_bound_decides(chosen, values, marked):
    """The last weight tried was better than the chosen, so what is beyond the bound on perplexity was refused."""
    points = {0: 40, 1: 55, chosen: 60, **values}
    grid = [{"relative": w, **({} if v is None else {"value": v})} for w, v in sorted(points.items())]
    one = cell("LoRE", tune={"grid": grid, "max_perplexity": 1.5, "unguided_perplexity": 1.0, "objective": "policy_accuracy"})
    one["values"]["relative"] = chosen
    said = [one for one in rules.marks([one]) if "bound" in one]
    assert said == ["a larger weight is better, but its text breaks the bound on perplexity"] * marked
    assert not rules.older(one) and not rules.marks([], ranked=[one])


def test_marks_stand_in_the_tables(tmp_path):
    made.write(tmp_path, *(cell("VPL", 2 if seed != 1 else rules.NEWEST, seed, method="vpl") for seed in range(3)))
    made.write(tmp_path, cell("P-DPO", method="pdpo", fields={"adapt_steps": 2}), cell("LoRE"), cell("Zero-Shot"))
    for name, rows in (("4", 2), ("5", 1), ("9", 2)):  # 5 has no P-DPO
        found, _ = table(name, tmp_path)
        of = {row["row"]: row.get("marks", "") for row in found.rows if row.get("marks")}
        letter = of["VPL"]
        assert len(of) == rows and found.columns[-1].key == "marks"
        assert f"{letter}: made by the older rule: {BIASES.before}. VPL (seeds 0, 2)." in found.notes
        assert all("older rule" in form(found) for form in (markdown, latex)) and as_csv(found).splitlines()[0].endswith(
            ",marks"
        )
    assert any("leave the policy as it is" in note and "P-DPO" in note for note in found.notes)
    assert any("older rule" in note and "VPL" in note for note in table("6", tmp_path)[0].notes)
    made.write(tmp_path, *(cell("VPL", seed=seed, method="vpl") for seed in range(3)))
    assert table("5", tmp_path)[0].columns[-1].key == "seeds", "nothing must be said any more"


def test_a_table_says_of_a_row_what_matters_for_its_numbers(tmp_path):
    """No weight matters for what a reward model ranks; its biases do, also beside a policy that we do not have."""
    tune = {"grid": [{"relative": 0}, {"relative": 3}]}
    for name, data in (("titles", "Pref-LaMP"), ("types", "PRISM")):
        one = cell("VPL", 2, set=name, stands_for=data, method="vpl", tune=tune)
        one["values"]["relative"] = 3
        made.write(tmp_path, one, cell("LoRE", set=name, stands_for=data))
    grid, biases = "no larger one was tried", BIASES.before
    for name, says_grid in (("3", False), ("8", False), ("7", True), ("9", True), ("12", False)):
        notes = " ".join(table(name, tmp_path)[0].notes)
        assert biases in notes and (grid in notes) == says_grid, name


def test_marks_stand_in_the_figures_and_the_report(tmp_path):
    made.write(tmp_path, cell("VPL", 2, method="vpl"), cell("LoRE"), cell("ICL"))
    text = lambda number: " ".join(figure(number, tmp_path)[0].get_suptitle().split())  # noqa: E731
    assert "older rules, which the tables name: VPL of titles." in text("1") and "VPL of titles." in text("2")
    assert "older rules" not in text("3"), "it has no VPL"
    found = report.report(tmp_path)
    assert [(one["number"], one["files"]) for one in found["older"]] == [
        (BIASES.number, ["cpu/titles/smollm2-135m/vpl-0.json"])
    ]
    report.write(tmp_path / "a.html", found)
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert f"rule {BIASES.number}: VPL&#39;s encoder had no biases" in page
    made.write(tmp_path, cell("VPL", method="vpl"))
    assert report.report(tmp_path)["older"] == [] and "older rules" not in text("1")


def test_a_set_of_older_cells_is_named_as_a_whole(tmp_path):
    made.write(tmp_path, *(cell(row, 2, set="pref_lamp") for row in ("LoRE", "MPU", "ICL")))
    assert all("name: all of pref_lamp." in " ".join(figure(number, tmp_path)[0].get_suptitle().split()) for number in "123")


def test_seeds_made_before_and_after_a_field_was_there_stand_in_one_row(tmp_path):
    """Its default is what was done before; another value is another setting."""
    keyed = lambda seed, fields: (one := cell("LoRE", seed=seed)) | {"key": one["key"] | {"row": ["lore", fields]}}  # noqa: E731
    made.write(tmp_path, keyed(0, {"rank": 8}), keyed(1, {"rank": 8, "max_grad_norm": 0.0}))
    assert len(results.read(tmp_path)) == 2
    made.write(tmp_path, keyed(1, {"rank": 4, "max_grad_norm": 0.0}))
    with pytest.raises(results.PyargsError, match="differ in 'key.row'"):
        results.read(tmp_path)
