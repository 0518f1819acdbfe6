"""The paper's numbers are whole, and those of its notes."""

from __future__ import annotations

import json

import pytest
from cells import ROOT

from pyargs import files


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
