"""The demonstration runs on any model and says what it found."""

from __future__ import annotations

import json

from pyargs.cli import main


def test_the_demo_runs_on_any_model_and_says_what_it_found(stages, capsys, tmp_path):
    """On a random model nothing moves; the demo must still finish, and say so."""
    folder, _ = stages
    assert main(["demo", "--backbone", str(folder / "lm"), "--prompts", "3", "--out", str(tmp_path / "demo")]) == 0
    assert not capsys.readouterr().out  # the last screen, on stderr, is for a person
    result = json.loads((tmp_path / "demo/result.json").read_text())
    assert set(result["shown"]) == {"ada", "cora", "noah", "paul"}
    assert result["weight_0"] == {"prompts": 3, "same_as_greedy_generate": 3}
    for user in result["shown"].values():
        assert user["low"] <= user["difference"] <= user["high"]
        inside = user["low"] <= 0 <= user["high"]
        assert not (inside and user["moved"])
    page = (tmp_path / "demo/report.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and "One model, 4 users" in page
    assert f"For {result['moved']} of 4 users" in page
