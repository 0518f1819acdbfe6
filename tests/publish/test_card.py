"""What a card says of a model: its numbers are those of its own results, with the intervals of `metrics.bootstrap`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from verbs import call

import pyargs
from pyargs.errors import PyargsError
from pyargs.files import read_json, sha256, write_json
from pyargs.metrics.bootstrap import user_interval
from pyargs.metrics.rm_accuracy import rm_accuracy
from pyargs.publish.card import measures
from pyargs.publish.staging import stage

HOUSE = Path(__file__).parents[1] / "models" / "first_house"
SAID = dict(data="org/planted", data_licence="CC0-1.0")


@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.integers(1, 5), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_every_measure_of_a_result_with_its_interval(counts, seed):
    torch.manual_seed(seed)
    users = [f"user {n}" for n, count in enumerate(counts) for _ in range(count)]
    made = lambda: rm_accuracy(torch.randn(len(users), 2), users)  # noqa: E731
    answers = [{"user_id": user, "pair_id": "p", "text": "a secret", "rouge1": float(n)} for n, user in enumerate(users)]
    rouge = sum(one["rouge1"] for one in answers) / len(answers)
    won = made()
    values = {
        "rm_accuracy": made(),
        "policy_accuracy": {"base": made(), "personal": {"paper": made(), "all": made()}},
        "reward_weight": 0.5,
        "generations": {
            "n": 3,
            "rouge1": rouge,
            "perplexity": 2.0,
            "win_rate": {"win_rate": won["accuracy"], "each": won["each"]},
        },
        "answers": answers,
    }
    rows = {row["name"]: row for row in measures(values)}
    assert set(rows) == {
        "RM accuracy",
        "policy accuracy, the policy alone",
        "policy accuracy, guided for the user, in the paper's form",
        "policy accuracy, guided for the user, mean per token",
        "ROUGE-1",
        "perplexity of the answers",
        "win rate over the unguided answers",
    }
    for name, own in (("RM accuracy", values["rm_accuracy"]), ("win rate over the unguided answers", won)):
        wanted = user_interval({user: [100.0 * int(mark) for mark in marks] for user, marks in own["each"].items()})
        assert rows[name]["value"] == own["accuracy"]
        assert {key: rows[name][key] for key in ("low", "high", "n", "users")} == {
            k: wanted[k] for k in ("low", "high", "n", "users")
        }
    assert rows["ROUGE-1"]["value"] == rouge and rows["ROUGE-1"]["users"] == len(counts)
    assert rows["perplexity of the answers"]["users"] is None
    assert not [user for user in users if user in str(rows)] and "secret" not in str(rows)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    from pyargs import cli

    out = tmp_path_factory.mktemp("evaluated") / "result.json"
    words = ["evaluate", str(HOUSE / "lore"), "--backbone", str(HOUSE / "backbone"), "--data", "synthetic", "--out", str(out)]
    assert cli.main(words) == 0
    return out


def test_a_card_has_what_was_measured_on_this_model(evaluated, tmp_path, capsys):
    words = ["--data", SAID["data"], "--data-licence", SAID["data_licence"], "--results", str(evaluated)]
    found = call(capsys, ["push", str(HOUSE / "lore"), "me/lore", *words, "--out", str(tmp_path / "out")])
    text, result = (tmp_path / "out/README.md").read_text(), read_json(evaluated)
    accuracy = result["values"]["rm_accuracy"]
    each = {user: [100.0 * int(mark) for mark in marks] for user, marks in accuracy["each"].items()}
    over = user_interval(each)
    shown = f"95% over {len(each)} users: {over['low']:.2f} to {over['high']:.2f}"
    (own,) = ModelCard(text).data.eval_results
    assert own.metric_value == round(accuracy["accuracy"], 3) and shown in own.metric_name and own.dataset_split == "query"
    assert (
        f"| RM accuracy | {accuracy['accuracy']:.2f} | ({shown}" in text and own.dataset_revision == result["inputs"]["data"]
    )
    assert ModelCard(text).data.datasets == ["org/planted"] and "CC0-1.0" in text and 'load_model("me/lore")' in text
    assert not [user for user in each if user in text] and str(tmp_path) not in text
    assert found["users"] == 0 and pyargs.load_model(tmp_path / "out", backbone=HOUSE / "backbone").users.trained == 0


def test_results_of_another_model_are_refused(evaluated, tmp_path):
    with pytest.raises(PyargsError, match="measured on another model"):
        stage(HOUSE / "pref", tmp_path / "out", results=[evaluated], **SAID)
    result = read_json(evaluated)
    for wrong, why in (
        ({**result, "stage": "tune"}, "of stage 'tune'"),
        ({"values": {}}, "no file of `pyargs evaluate`"),
        ({**result, "inputs": {}}, "another model"),
    ):
        write_json(tmp_path / "wrong.json", wrong)
        with pytest.raises(PyargsError, match=why):
            stage(HOUSE / "lore", tmp_path / "out", results=[tmp_path / "wrong.json"], **SAID)
    assert result["inputs"]["model"] == sha256(HOUSE / "lore") and not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["global_rm", "genarm", "icl", "lore", "pal", "pdpo"])
def test_a_card_is_a_card(method, tmp_path):
    stage(HOUSE / method, tmp_path / "out", repo="me/model", **SAID)
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.library_name == "pyargs" and card.data.base_model is None  # tiny-random is nobody's model
    assert method in card.data.tags and "{{" not in card.text and "{%" not in card.text
    for heading in ("Load it", "Measured", "What it is for, and what it does not show", "Cite"):
        assert f"\n## {heading}\n" in card.text
    assert "Nothing was measured" in card.text and "2512.23067" in card.text


def test_the_base_model_is_named_as_others_know_it(tmp_path, lm_folder):
    from small import config_of, saved

    from pyargs.training import hooks

    saved(hooks.method("lore"), config_of("lore", lm_folder), tmp_path / "m", lm_folder)
    for name, shown in (("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"), ("org/base", "org/base")):
        stage(tmp_path / "m", tmp_path / "out", base_model=name, **SAID)
        assert ModelCard.load(tmp_path / "out/README.md").data.base_model == shown
        assert read_json(tmp_path / "out/config.json")["backbone"] == name
