"""Cells: read, added up, and refused by file and key where they are damaged."""

from __future__ import annotations

from collections import Counter
from statistics import mean

import cells as made
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import results
from experiments.__main__ import main
from pyargs import files
from pyargs.errors import PyargsError


def test_no_results_is_a_clear_message(tmp_path, capsys):
    assert main(["table", "4", "--results", str(tmp_path / "none")]) == 1
    said = capsys.readouterr().err
    assert "no result cells below" in said and "python -m experiments reproduce smoke" in said


def broken(change):
    cell = made.cell("LoRE")
    change(cell)
    return cell


DAMAGE = {
    "values": lambda c: c.pop("values"),
    "seed": lambda c: c.update(seed="0"),
    "row": lambda c: c.update(row="MPU"),
    "profile": lambda c: c.update(profile="gpu"),
    "key": lambda c: c.pop("key"),
    "key.decode": lambda c: c["key"].pop("decode"),
    "values.rm_accuracy": lambda c: c["values"].update(rm_accuracy=3),
    "values.rm_accuracy.accuracy": lambda c: c["values"]["rm_accuracy"].update(accuracy=float("nan")),
    "values.rm_accuracy.accuracy ": lambda c: c["values"]["rm_accuracy"].update(accuracy=1.25),
    "values.rm_accuracy.each": lambda c: c["values"]["rm_accuracy"]["each"].update({"user 0": "10x"}),
    "values.policy_accuracy": lambda c: c["values"].update(policy_accuracy=[]),
    "values.policy_accuracy.personal.all": lambda c: c["values"]["policy_accuracy"]["personal"].update(all={}),
    "values.generations.rouge1": lambda c: c["values"]["generations"].update(rouge1="20"),
    "values.generations.rougeL": lambda c: c["values"]["generations"].update(rougeL=float("inf")),
    "values.generations.win_rate": lambda c: c["values"]["generations"].update(win_rate={}),
    "values.generations.win_rate.each": lambda c: c["values"]["generations"]["win_rate"].update(each={"user 0": "x"}),
    "values.generations.win_rate.win_rate": lambda c: c["values"]["generations"]["win_rate"].update(win_rate=-1.0),
    "values.generations.rouge1 ": lambda c: c["values"]["generations"].update(rouge1=90.0),
    "values.generations.rougeL ": lambda c: (c.pop("answers"), c["values"]["generations"].update(rougeL=-5.0)),
    "values.relative": lambda c: c["values"].update(relative=[1]),
    "answers[3]": lambda c: c["answers"].__setitem__(3, {}),
    "answers": lambda c: c.update(answers=5),
    "answers[1]": lambda c: c["answers"][1].update(pair_id=None),
    "key.recipe": lambda c: c["key"].update(recipe="new"),
    "tune": lambda c: c.update(tune=[1]),
    "tune.grid[0].value": lambda c: c.update(tune={"grid": [{"relative": 0, "value": "x"}]}),
    "tune.grid[1]": lambda c: c.update(tune={"grid": [{"relative": 0}, {}]}),
    "seconds": lambda c: c.update(seconds=[1]),
    "seconds.train": lambda c: c.update(seconds={"train": "long"}),
    "provenance": lambda c: c.update(provenance=3),
    "provenance.hardware": lambda c: c.update(provenance={"hardware": [1]}),
    "provenance.hardware.cpu": lambda c: c.update(provenance={"hardware": {"cpu": 3}}),
    "provenance.versions": lambda c: c.update(provenance={"versions": "1.0"}),
    "provenance.commit": lambda c: c.update(provenance={"commit": 3}),
    "fields": lambda c: c.update(fields=3),
    "backbone": lambda c: c.update(backbone=3),
    "dtype": lambda c: c.update(dtype=16),
    "data": lambda c: c.update(data=4),
    "values.generations.win_rate.tokens": lambda c: c["values"]["generations"]["win_rate"].update(tokens=[None, 1]),
    "values.generations.n": lambda c: c["values"]["generations"].update(n=[1]),
    "answers[1].text": lambda c: c["answers"][1].update(text=5),
    "answers[1].text ": lambda c: c["answers"][1].pop("text"),
    "answers[1].copied": lambda c: c["answers"][1].update(text=None, digest="ab", words=9),
    "answers[1].digest": lambda c: c["answers"][1].update(text=None, copied=8, words=9),
    "values.generations.cut": lambda c: c["values"]["generations"].update(cut="all"),
    "answers[2].rouge1": lambda c: c["answers"][2].update(rouge1=float("nan")),
}


@pytest.mark.parametrize("key", DAMAGE)
def test_damage_names_file_and_key(key, tmp_path):
    made.write(tmp_path, made.cell("MPU"))
    path = tmp_path / "cpu/pref_lamp/smollm2-135m/lore-0.json"
    files.write_json(path, broken(DAMAGE[key]))
    with pytest.raises(PyargsError) as error:
        results.read(tmp_path)
    assert str(path) in str(error.value) and f"'{key.strip()}'" in str(error.value)


def test_half_a_file_and_no_cell(tmp_path):
    made.write(tmp_path, made.cell("MPU"))
    path = tmp_path / "cpu/pref_lamp/smollm2-135m/lore-0.json"
    path.write_text('{"profile": "cpu", ')
    with pytest.raises(PyargsError, match="lore-0.json is not JSON"):
        results.read(tmp_path)
    path.write_text("[]")
    with pytest.raises(PyargsError, match="lore-0.json is no cell"):
        results.read(tmp_path)
    for damage in (b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(damage)
        with pytest.raises(PyargsError, match="lore-0.json is not JSON"):
            results.read(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(PyargsError, match="lore-0.json is not JSON"):
        results.read(tmp_path)


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
