"""Tables with methods in their rows, from made-up cells: sums by hand, correlations, seeds."""

from __future__ import annotations

from statistics import mean, stdev

import pytest
from cells import row_of

from experiments import results
from experiments.tables import table
from experiments.tables.render import MISSING
from experiments.tables.specs import GUIDES, TLDR_EIGHT
from pyargs.metrics.bootstrap import user_interval
from pyargs.metrics.correlation import correlate_methods


def test_means_and_spreads_by_hand(folder):
    found, about = table("9", folder)
    cells = [c for c in results.read(folder) if (c["profile"], c["set"], c["row"]) == ("cpu", "pref_lamp", "LoRE")]
    assert about == {"profile": "cpu", "missing": []} and len(cells) == 3
    own = row_of(found, "LoRE")
    for key, values in {
        "rm_accuracy": [c["values"]["rm_accuracy"]["accuracy"] for c in cells],
        "policy_accuracy": [c["values"]["policy_accuracy"]["personal"]["paper"]["accuracy"] for c in cells],
        "policy_accuracy_all": [c["values"]["policy_accuracy"]["personal"]["all"]["accuracy"] for c in cells],
        "policy_accuracy_centred": [c["values"]["policy_accuracy"]["personal"]["centred"]["accuracy"] for c in cells],
        "rouge1": [c["values"]["generations"]["rouge1"] for c in cells],
    }.items():
        assert own[key]["mean"] == pytest.approx(mean(values)) and own[key]["std"] == pytest.approx(stdev(values))
        assert own[key]["low"] <= own[key]["mean"] <= own[key]["high"] and own[key]["n"] == 3
    for key, name in (("rm_accuracy", None), ("rouge1", "rouge1")):
        by_user = {}
        for c in cells:
            for user, each in c["values"]["rm_accuracy"]["each"].items() if name is None else ():
                by_user.setdefault(user, []).extend(100.0 * int(outcome) for outcome in each)
            for answer in c["answers"] if name else ():
                by_user.setdefault(answer["user_id"], []).append(answer[name])
        right = user_interval(by_user)
        assert (own[key]["low"], own[key]["high"]) == (right["low"], right["high"]), "all seeds of a user together"
    assert [own["weight"][f"seed_{seed}"] for seed in range(3)] == [c["values"]["relative"] for c in cells]
    assert own["paper_rm_accuracy"] == {"mean": 65.6, "std": 7.89}


def test_tables_3_and_7_have_the_subset_and_8_has_all(folder):
    few, every = table("3", folder)[0], table("8", folder)[0]
    users, pairs = 8, sum(4 + n % 3 for n in range(8))
    for found, count in ((few, users), (every, pairs)):
        value = row_of(found, "LoRE")["rm_accuracy"]["mean"] * 2 * count / 100  # two seeds
        assert value == pytest.approx(round(value))
    assert row_of(table("7", folder)[0], "LoRE")["rm_accuracy"] == row_of(few, "LoRE")["rm_accuracy"]


def test_correlations_are_those_of_the_cells(folder):
    found = table("2", folder)[0].below[0]
    cells = [c for c in results.read(folder) if c["set"] == "length_prefs"]
    for form, heading in (("paper", "paper's form"), ("all", "all normalised")):
        points = {}
        for cell in cells:
            if cell["row"] in TLDR_EIGHT:
                (kind,) = {"personal", "global"} & set(cell["values"]["policy_accuracy"])
                y = cell["values"]["policy_accuracy"][kind][form]["accuracy"]
                points.setdefault(cell["row"], []).append((cell["values"]["rm_accuracy"]["accuracy"], y))
        right = correlate_methods({row: points[row] for row in TLDR_EIGHT})
        assert len(points) == 8 and right["points"]["n"] == 16
        rows = [row for row in found.rows if row["policy"] != MISSING and heading in row["y"]]
        assert len(rows) == 3
        for row in rows:
            one = right["points"][row["statistic"]]
            assert row["points"] == {"mean": one["value"], "low": one["low"], "high": one["high"]}
            assert row["means"]["mean"] == right["means"][row["statistic"]]["value"]
    assert {row["paper"] for row in found.rows if row["policy"] == MISSING} >= {"0.15", "0.11"}


def test_win_rates_have_intervals_over_users(folder):
    found = table("5", folder)[0]
    for row in GUIDES:
        one = row_of(found, row)["win_rate_smollm2-135m"]
        assert one["low"] < one["mean"] < one["high"], row


def test_a_policy_that_is_not_there(folder):
    found, about = table("11", folder)
    assert row_of(found, "LoRE")["rouge1"] == MISSING and row_of(found, "LoRE")["paper_rouge1"] == {"mean": 45.14, "std": 0.03}
    assert row_of(found, "LoRE")["rm_accuracy"] != MISSING, "the reward model is the same for every policy"
    assert any("beside the paper's 3B" in note and "python -m experiments reproduce paper" in note for note in found.notes)


def test_p_dpo_is_its_own_policy_in_every_table(folder):
    """The paper repeats its row in Tables 10 to 12: the model is the same, whatever policy stands beside it."""
    first = row_of(table("9", folder)[0], "P-DPO")
    for name in ("10", "11", "12"):
        found, about = table(name, folder)
        own = row_of(found, "P-DPO")
        for key in ("policy_accuracy", "rouge1", "perplexity"):
            assert own[key] == first[key] != MISSING
        assert "P-DPO" not in about["missing"] and "LoRE" in about["missing"]
        assert any("its row is the same beside every policy" in note for note in found.notes)
    for name in ("9", "5"):  # 5 has several policies, and no such row
        assert not any("its row is the same" in note for note in table(name, folder)[0].notes)
