"""Cells that are damaged are refused by file and key, and what is only unusual is a result."""

from __future__ import annotations

import cells as made
import pytest

from experiments import results
from experiments.__main__ import main
from experiments.tables import table
from experiments.tables.render import markdown
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
