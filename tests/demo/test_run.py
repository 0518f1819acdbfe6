"""The demonstration runs on any model and says what it found."""

from __future__ import annotations

from verbs import call


def test_the_demo_runs_on_any_model_and_says_what_it_found(stages, capsys, tmp_path):
    """On a random model nothing moves; the demo must still finish, and say so."""
    folder, _ = stages
    result = call(capsys, ["demo", "--backbone", str(folder / "lm"), "--prompts", "3", "--out", str(tmp_path / "demo")])
    assert set(result["shown"]) == {"ada", "cora", "noah", "paul"} and "answers" not in result
    assert result["speed"]["same_tokens"]
    assert result["weight_0"] == {"prompts": 3, "same_as_greedy_generate": 3}
    for user in result["shown"].values():
        assert user["low"] <= user["difference"] <= user["high"]
        inside = user["low"] <= 0 <= user["high"]
        assert not (inside and user["moved"])
    page = (tmp_path / "demo/report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "One model, 4 users" in page
    assert f"For {result['moved']} of 4 users" in page
