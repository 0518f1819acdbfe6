"""The command line: verbs by name, JSON on stdout, stages that are not done twice and never overwrite what is not theirs."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from verbs import call, run

from pyargs import files
from pyargs.data import synthetic


def test_help_is_fast_and_lists_every_verb():
    start = time.perf_counter()
    text = run("--help").stdout
    seconds = time.perf_counter() - start
    for verb in ("train", "adapt", "tune", "decode", "evaluate", "demo", "data", "models", "env"):
        assert f"\n  {verb} " in text
    code = "import sys, pyargs.cli; pyargs.cli.verbs(); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0, "--help must not import torch"
    assert seconds < 5  # a bound against accidents; the half second is measured by hand, machines differ


def test_a_wrong_verb_or_flag_is_usage():
    assert "Did you mean: train?" in run("trian", expect=2).stderr
    assert "unrecognized arguments" in run("adapt", "model", "--out", "x", "--data", "demo", "--wieght", "1", expect=2).stderr
    assert "Did you mean: lore" in run("train", "lor", "--out", "x", "--data", "demo", expect=1).stderr
    assert "Did you mean: demo" in run("train", "lore", "--out", "x", "--data", "dem", expect=1).stderr
    assert "at least 1" in run("decode", "m", "--policy", "p", "--out", "x", "--limit", "-3", expect=2).stderr
    assert run(expect=2).stdout.startswith("usage: pyargs")
    assert run("--version").stdout.strip()


def test_the_whole_path_and_nothing_twice(stages, capsys):
    folder, steps = stages
    plan = call(capsys, [*steps["train"], "--dry-run"])
    assert plan["users"] > 0 and not (folder / "seen").exists()
    for words in steps.values():
        done = call(capsys, words)
        assert not done.get("already_done")
    result = files.read_json(folder / "result.json")
    assert {"base", "personal", "weight_0"} == set(result["values"]["policy_accuracy"])
    found = result["values"]["generations"]
    assert 0 <= found["rouge1"] <= 100 and found["perplexity"] >= 1 and "layer 2, not rescaled" in found["bertscore_model"]
    assert found["win_rate"]["n"] == 5 and 0 <= found["win_rate"]["win_rate"] + found["win_rate"]["tie_rate"] <= 100
    written = result["values"]["answers"]
    assert found["rouge1"] == pytest.approx(sum(a["rouge1"] for a in written) / 5, abs=0.01)
    names = {"user_id", "pair_id", "text", "digest", "words", "copied", "quotes", "rouge1", "rougeL", "bertscore"}
    assert all(set(a) == names for a in written) and 0 <= found["cut"] <= 100
    # Answers that are not this model's, of another weight, twice there or no answers at all are refused.
    other = [*steps["evaluate"][:-1], str(folder / "other.json")]
    at = other.index("--generations") + 1
    zero = [*other[:at], str(folder / "zero.jsonl"), *other[at + 1 :]]
    if tuned := files.read_json(folder / "tune.json")["reward_weight"]:
        assert f"reward_weight 0.0, not {tuned}" in call(capsys, zero, expect=1)
    for text, message in (("{}", "line 1 is no line"), ("[1]", "line 1 is no line"), (None, "was answered before")):
        first = (folder / "answers.jsonl").read_text().splitlines()[0]
        (folder / "bad.jsonl").write_text(text or f"{first}\n{first}\n")
        assert message in call(capsys, [*other[:at], str(folder / "bad.jsonl"), *other[at + 1 :]], expect=1)
    stage = files.read_json(folder / "answers.jsonl.stage.json")
    files.write_jsonl(folder / "else.jsonl", files.read_jsonl(folder / "answers.jsonl"))
    files.write_json(folder / "else.jsonl.stage.json", {**stage, "inputs": {**stage["inputs"], "model": "another"}})
    assert "another model" in call(capsys, [*other[:at], str(folder / "else.jsonl"), *other[at + 1 :]], expect=1)
    assert result["provenance"]["versions"]["torch"] and result["inputs"]["data"]
    answers = list(files.read_jsonl(folder / "answers.jsonl"))
    assert len(answers) == 5 and all(len(a["tokens"]) == len(a["slots"]) <= 6 for a in answers)
    for verb, words in steps.items():
        assert call(capsys, words)["already_done"], verb
    # Other settings never overwrite a result, and a stage that was killed is made again.
    assert "other settings" in call(capsys, [*steps["decode"], "--seed", "3"], expect=1)
    stage = folder / "answers.jsonl.stage.json"
    stage.write_text(stage.read_text().replace('"finished": true', '"finished": false'))
    (folder / "answers.jsonl").unlink()
    again = call(capsys, steps["decode"])
    assert not again.get("already_done")
    assert [a["tokens"] for a in files.read_jsonl(folder / "answers.jsonl")] == [a["tokens"] for a in answers]


def test_a_file_of_someone_else_is_left_alone(stages, capsys, tmp_path):
    folder, steps = stages
    for verb in ("train", "adapt", "tune"):
        call(capsys, steps[verb])
    mine = tmp_path / "answers.jsonl"
    mine.write_text("precious")
    words = [str(mine) if word == str(folder / "answers.jsonl") else word for word in steps["decode"]]
    assert "was not written by this command" in call(capsys, words, expect=1)
    assert mine.read_text() == "precious"


def test_a_failed_stage_does_not_block_its_output(stages, capsys, tmp_path):
    folder, _ = stages
    words = ["train", "lore", "--data", "synthetic", "--freeze-backbone", "--epochs", "1", "--out", str(tmp_path / "rm")]
    assert "cannot load the model" in call(capsys, [*words, "--backbone", "no/such"], expect=1)
    assert call(capsys, [*words, "--backbone", str(folder / "lm")])["finished"]
    assert "epochs must be > 0" in call(capsys, [*words[:-1], str(tmp_path / "x"), "--epochs", "0"], expect=1)


def test_other_weights_under_the_same_name_are_another_stage(stages, capsys, tmp_path):
    _, _ = stages
    lm = str(synthetic.tiny_lm(tmp_path / "lm", seed=1))
    words = [
        "train",
        "lore",
        "--data",
        "synthetic",
        "--freeze-backbone",
        "--epochs",
        "1",
        "--backbone",
        lm,
        "--out",
        str(tmp_path / "rm"),
    ]
    assert not call(capsys, words).get("already_done")
    assert call(capsys, words)["already_done"]
    synthetic.tiny_lm(tmp_path / "lm", seed=2)
    assert "other settings or inputs" in call(capsys, words, expect=1)


def test_tuning_and_adaptation_read_their_own_split_only(stages, capsys):
    from pyargs.data import content_hash, load, of_split

    folder, steps = stages
    for verb in ("train", "adapt", "tune"):
        call(capsys, steps[verb])
    data = load("synthetic")
    for file, split in (("model", "support"), ("tune.json", "train_test")):
        record = files.read_json(folder / f"{file}.stage.json")
        assert record["inputs"]["data"] == content_hash(of_split(data, split))


def test_models_that_answer_by_themselves_take_no_policy_and_no_weight(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ["--data", "synthetic"]
    call(capsys, ["train", "icl", "--tiny", "--shots", "2"])
    call(capsys, ["adapt", "output/tiny/icl", *data, "--out", "icl"])
    few = [*data, "--limit", "2", "--max-new-tokens", "4"]
    assert "leave them out for" in call(capsys, ["decode", "icl", *few, "--reward-weight", "1", "--out", "a.jsonl"], expect=1)
    call(capsys, ["decode", "icl", *few, "--out", "a.jsonl"])
    assert len(list(files.read_jsonl("a.jsonl"))) == 2
    assert "leave --policy out" in call(
        capsys, ["decode", "icl", *few, "--policy", "tiny-random", "--reward-weight", "1", "--out", "b.jsonl"], expect=1
    )
    assert "no weight to choose" in call(capsys, ["tune", "icl", *data, "--out", "t.json"], expect=1)
    values = call(capsys, ["evaluate", "icl", *data, "--generations", "a.jsonl", "--out", "r.json"])["values"]
    assert set(values["policy_accuracy"]["personal"]) == {"mean", "sum"} and values["generations"]["n"] == 2
    zero = ["evaluate", "icl", *data, "--generations", "a.jsonl", "--zero-shot", "a.jsonl", "--out", "z.json"]
    assert "has no rewards" in call(capsys, zero, expect=1)
    # A reward model without its policy: what it can say alone, and no more.
    call(capsys, ["train", "pal", "--tiny", "--freeze-backbone"])
    call(capsys, ["adapt", "output/tiny/pal", *data, "--out", "pal"])
    assert set(call(capsys, ["evaluate", "pal", *data, "--out", "p.json"])["values"]) == {"rm_accuracy"}
    alone = ["evaluate", "pal", *data, "--policy", "tiny-random", "--out", "q.json"]
    assert "give both --policy and the weight" in call(capsys, alone, expect=1)
    assert "name the --policy" in call(capsys, ["decode", "pal", *few, "--best-of", "2", "--out", "c.jsonl"], expect=1)
    both = ["--policy", "tiny-random", *few]
    assert "PAL-B" in call(capsys, ["decode", "pal", *both, "--reward-weight", "1", "--out", "c.jsonl"], expect=1)
    call(capsys, ["decode", "pal", *both, "--best-of", "3", "--out", "c.jsonl"])
    assert len(list(files.read_jsonl("c.jsonl"))) == 2


@pytest.mark.parametrize("verb", ["decode", "evaluate"])
def test_a_split_without_rows_is_named(verb, capsys, tmp_path):
    words = [verb, "nowhere", "--data", "synthetic", "--split", "elsewhere", "--out", str(tmp_path / "out")]
    assert "no rows with split 'elsewhere' (there are: query" in call(capsys, words, expect=1)
