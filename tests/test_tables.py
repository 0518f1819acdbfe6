"""Tables and figures from made-up cells: sums by hand, gaps that name their command, formats that parse, damage."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from collections import Counter
from pathlib import Path
from statistics import mean, stdev

import cells as made
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import profiles, results
from experiments.__main__ import main
from experiments.tables import NAMES, table
from experiments.tables.captions import makes, runs
from experiments.tables.render import MISSING, OURS, Column, Table, as_csv, escape, latex, markdown
from experiments.tables.specs import GUIDES, SPECS, TLDR_EIGHT
from pyargs import files
from pyargs.errors import PyargsError
from pyargs.metrics.bootstrap import user_interval
from pyargs.metrics.correlation import correlate_methods

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return made.full(tmp_path_factory.mktemp("experiments"))


def printed(*words, capsys) -> str:
    assert main(["table", *map(str, words)]) == 0
    return capsys.readouterr().out


def row_of(found: Table, name: str) -> dict:
    return next(row for row in found.rows if row["row"] == name)


# --- numbers


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


def test_which_policy_accuracy_a_row_has(folder):
    of = {c["row"]: c for c in results.read(folder) if c["set"] == "pref_lamp" and c["seed"] == 0}

    def given(row, *path):
        found = of[row]["values"]["policy_accuracy"]
        for key in path:
            found = found[key]
        return found["accuracy"]

    value = lambda row, form: results.policy_accuracy(of[row], form)["value"]  # noqa: E731
    assert value("Global RM", "centred") == given("Global RM", "global", "centred")
    assert value(made.UNGUIDED, "centred") == given(made.UNGUIDED, "weight_0", "paper"), "without a reward nothing is centred"
    assert value("ICL", "centred") == given("ICL", "personal", "mean")
    assert value("Global RM", "paper") == given("Global RM", "global", "paper")
    assert value("Global RM", "all") == given("Global RM", "global", "all")
    for form in ("paper", "all"):
        assert value(made.UNGUIDED, form) == given(made.UNGUIDED, "weight_0", form)
        assert value("ICL", form) == given("ICL", "personal", "mean")  # eq. 7, whichever is asked for
        assert value("Zero-Shot", form) == given("Zero-Shot", "base", "mean")
    assert results.policy_accuracy(of["PAL"]) is None and results.policy_accuracy(of["word overlap"]) is None


@settings(deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=5), st.text("01", min_size=1, max_size=9), min_size=1), st.integers(0, 5))
def test_the_subset_has_one_pair_of_each_user(outcomes, seed):
    cell = {"values": {"rm_accuracy": made.accuracy(outcomes)}}
    one = results.one_per_user(results.rm_accuracy, seed)
    found = one(cell)
    assert found == one(cell), "seeded"
    assert {user: len(each) for user, each in found["users"].items()} == dict.fromkeys(outcomes, 1)
    for user, (value,) in found["users"].items():
        assert str(int(value / 100)) in outcomes[user]
    assert found["value"] == pytest.approx(mean(value for (value,) in found["users"].values()))


def test_the_subset_is_the_same_pair_in_every_row_and_every_pair_is_taken_by_some_seed():
    names = {str(n): "01234567" for n in range(40)}
    where = lambda seed: results.one_per_user(  # noqa: E731
        lambda cell: {"value": 0, "users": {user: [*map(float, text)] for user, text in names.items()}}, seed
    )({})["users"]
    assert where(0) == where(0) != where(1)
    assert set(Counter(place for (place,) in where(0).values())) == {float(n) for n in range(8)}


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


def test_win_rates_have_intervals_over_users(folder):
    found = table("5", folder)[0]
    for row in GUIDES:
        one = row_of(found, row)["win_rate_smollm2-135m"]
        assert one["low"] < one["mean"] < one["high"], row


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


@pytest.mark.parametrize("name", ["data", "dtype", "decode", "bertscore", "row", "tune"])
def test_cells_of_other_settings_do_not_stand_in_one_table(name, tmp_path):
    one, two, other = made.cell("LoRE"), made.cell("LoRE", 1), made.cell("MPU", policy="smollm2-360m")
    made.write(tmp_path, one, two, other)
    assert len(results.read(tmp_path)) == 3
    changed = lambda cell: cell | {"key": cell["key"] | {name: ["changed"]}}  # noqa: E731
    made.write(tmp_path, changed(other))
    if name in ("row", "tune"):
        assert len(results.read(tmp_path)) == 3, "of another row"
    else:
        with pytest.raises(PyargsError, match=rf"lore-0.json and .*mpu-0.json differ in 'key.{name}'"):
            results.read(tmp_path)
    made.write(tmp_path, other, changed(two))
    with pytest.raises(PyargsError, match=rf"lore-0.json and .*lore-1.json differ in 'key.{name}'"):
        results.read(tmp_path)


# --- what is missing


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


def test_cut_answers_are_said(tmp_path):
    cut, old, whole = made.cell("LoRE"), made.cell("MPU"), made.cell("VPL")
    cut["values"]["generations"]["cut"] = 60.0
    del old["values"]["generations"]["cut"]
    made.write(tmp_path, cut, old, whole)
    found = table("9", tmp_path)[0]
    assert row_of(found, "LoRE")["cut"]["mean"] == 60 and row_of(found, "MPU")["cut"] == MISSING
    assert any(note.startswith("More than half of the answers are cut off by the token limit: LoRE.") for note in found.notes)


# --- profiles and policies


def test_the_largest_profile_with_the_data_is_taken():
    cell = lambda profile, data: {"profile": profile, "stands_for": data}  # noqa: E731
    cells = [cell("smoke", "Pref-LaMP"), cell("cpu", "TLDR"), cell("cpu", "Pref-LaMP"), cell("gpu", "Pref-LaMP")]
    assert results.choose_profile(cells, "Pref-LaMP") == "gpu"
    assert results.choose_profile(cells, "TLDR") == "cpu"
    assert results.choose_profile(cells, "PRISM") == "gpu", "none has it: the largest of all"
    assert results.choose_profile(cells, "Pref-LaMP", "smoke") == "smoke"
    with pytest.raises(PyargsError, match="only of gpu, cpu, smoke: `python -m experiments reproduce paper`"):
        results.choose_profile(cells, "TLDR", "paper")


def test_policies_stand_beside_those_of_their_size():
    scales = ("0.5B", "1.5B", "3B", "7B")
    assert results.match(scales, ["smollm2-135m"]) == {"0.5B": "smollm2-135m", "1.5B": None, "3B": None, "7B": None}
    beside = results.match(scales, ["smollm2-135m", "Qwen/Qwen2.5-3B-Instruct"])
    assert beside == {"0.5B": "smollm2-135m", "1.5B": None, "3B": "Qwen/Qwen2.5-3B-Instruct", "7B": None}
    assert sorted(["x-1.7B", "tiny-random", "a-360m", "Qwen/Qwen2.5-0.5B"], key=results.size) == [
        "tiny-random",
        "a-360m",
        "Qwen/Qwen2.5-0.5B",
        "x-1.7B",
    ]


def test_two_sets_for_one_are_an_error(tmp_path):
    made.write(tmp_path, made.cell("LoRE"), made.cell("LoRE", set="other"))
    with pytest.raises(PyargsError, match="several sets for Pref-LaMP: other, pref_lamp"):
        table("4", tmp_path)


# --- formats


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


def test_the_command_prints_or_writes(folder, tmp_path, capsys):
    text = printed(4, "--results", folder, capsys=capsys)
    assert text.startswith("**Table 4.") and "± " in text
    assert main(["table", "4", "--results", str(folder), "--out", str(tmp_path / "a/4.md")]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "table": "4",
        "out": str(tmp_path / "a/4.md"),
        "profile": "cpu",
        "missing": [],
    }
    assert (tmp_path / "a/4.md").read_text(encoding="utf-8") == text


# --- the paper's numbers


def test_the_papers_numbers_are_whole():
    paper = files.read_json(ROOT / "experiments/expected/paper.json")
    json.dumps(paper, allow_nan=False)
    assert [*paper["tables"]] == ["1", "2", "3", "4", "5", "7", "8", "9", "10", "11", "12"]
    for name, rows in paper["tables"].items():
        if name != "1":
            for values in rows.values():
                assert all(len(number) == 2 and isinstance(number[0], int | float) for number in values.values())
    assert paper["tables"]["7"]["VPL"]["policy_accuracy 7B"] == [63.79, 2.31]
    assert paper["correlations"]["6"]["1.5B"]["win_rate ~ rouge1"]["kendall"] == -0.188


def test_the_papers_numbers_are_those_of_its_notes():
    source = ROOT.parent / "shared/paper_results.json"
    if not source.is_file():
        pytest.skip("no ../shared")
    import importlib.util

    spec = importlib.util.spec_from_file_location("paper_numbers", ROOT / "experiments/paper_numbers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.paper(files.read_json(source)) == files.read_json(ROOT / "experiments/expected/paper.json")
