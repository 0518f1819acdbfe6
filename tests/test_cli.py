"""The command line: verbs by name, JSON on stdout, stages that are not done twice and never overwrite what is not theirs."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
import time

import pytest

from pyargs import cli, files, methods
from pyargs.data import synthetic
from pyargs.errors import PyargsError

METHODS = [module.name for module in pkgutil.iter_modules(methods.__path__)]


def run(*words: str, expect: int = 0):
    done = subprocess.run([sys.executable, "-m", "pyargs.cli", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == expect, done.stderr
    return done


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


def test_every_option_of_a_method_explains_itself():
    text = run("train", "lore", "--help").stdout
    assert "--freeze-backbone" in text and "--rank" in text
    from dataclasses import fields

    from pyargs.training import hooks
    from pyargs.tune import Tuning

    for config in (*(hooks.method(name).Config for name in METHODS), Tuning):
        assert all(len(field.metadata.get("help", "")) > 5 for field in fields(config)), config


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """The whole path on a tiny random model, through the commands."""
    import os

    folder = tmp_path_factory.mktemp("stages")
    os.environ["PYARGS_CACHE"] = str(folder / "cache")
    lm = str(synthetic.tiny_lm(folder / "lm"))
    data = ["--data", "synthetic"]
    both = ["--policy", lm, *data]
    steps = {
        "train": ["lore", *data, "--backbone", lm, "--freeze-backbone", "--rank", "4", "--out", folder / "seen"],
        "adapt": [folder / "seen", *data, "--out", folder / "model"],
        "tune": [folder / "model", *both, "--prompts", "4", "--max-new-tokens", "6", "--out", folder / "tune.json"],
        "decode": [folder / "model", *both, "--tuned", folder / "tune.json", "--limit", "5", "--max-new-tokens", "6",
                   "--out", folder / "answers.jsonl"],
        "zero": [folder / "model", *both, "--reward-weight", "0", "--limit", "5", "--max-new-tokens", "6",
                 "--out", folder / "zero.jsonl"],
        "evaluate": [folder / "model", *both, "--tuned", folder / "tune.json", "--generations", folder / "answers.jsonl",
                     "--bertscore", lm, "--zero-shot", folder / "zero.jsonl", "--out", folder / "result.json"],
    }  # fmt: skip
    return folder, {verb: ["decode" if verb == "zero" else verb, *map(str, words)] for verb, words in steps.items()}


def call(capsys, words: list[str], expect: int = 0) -> dict:
    assert cli.main(words) == expect
    out = capsys.readouterr()
    return json.loads(out.out) if expect == 0 else out.err


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


def test_writing_is_whole_or_not_at_all(tmp_path):
    with pytest.raises(ZeroDivisionError), files.writing(tmp_path / "x.txt") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(PyargsError, match="not JSON"):
        files.read_json(tmp_path / "bad.json")
    with pytest.raises(PyargsError, match="does not exist"):
        files.sha256(tmp_path / "none")


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


def test_full_training_keeps_stdout_for_json(stages, capsys, tmp_path):
    folder, _ = stages
    words = [
        "train",
        "--data",
        "synthetic",
        "lore",
        "--backbone",
        str(folder / "lm"),
        "--epochs",
        "0.2",
        "--out",
        str(tmp_path / "rm"),
    ]
    assert call(capsys, words)["method"] == "lore"  # call() parses all of stdout; the method may stand anywhere


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


def test_decoding_follows_how_the_weight_was_tuned(stages, capsys, tmp_path):
    folder, steps = stages
    for verb in ("train", "adapt"):
        call(capsys, steps[verb])
    to = lambda words, **files: [*words[: words.index("--out")], "--out", str(tmp_path / files["out"])]  # noqa: E731
    tuned, count = str(tmp_path / "tune.json"), 0
    other = ["--eos-reward", "state", "--num-candidates", "3", "--objective", "fluency"]
    call(capsys, [*to(steps["tune"], out="tune.json"), *other])
    assert files.read_json(tuned)["eos_reward"] == "state" and files.read_json(tuned)["num_candidates"] == 3
    decode = [tuned if word == str(folder / "tune.json") else word for word in steps["decode"]]
    for flags in ([], ["--eos-reward", "state"], ["--num-candidates", "3"]):
        count += 1
        made = call(capsys, [*to(decode, out=f"{count}.jsonl"), *flags])["config"]
        assert (made["eos_reward"], made["num_candidates"]) == ("state", 3), flags
    for flags, name in (
        (["--eos-reward", "before"], "--eos-reward"),
        (["--num-candidates", "10"], "--num-candidates"),
        (["--whole-vocabulary"], "--whole-vocabulary"),
    ):
        assert f"leave {name} out" in call(capsys, [*to(decode, out="refused.jsonl"), *flags], expect=1)
    assert not (tmp_path / "refused.jsonl").exists()
    # What is not said in tuning is the decoder's own, which a flag may say too.
    plain = {**files.read_json(tuned), "eos_reward": None, "num_candidates": 10}
    files.write_json(tuned, plain)
    made = call(capsys, [*to(decode, out="plain.jsonl"), "--eos-reward", "before", "--num-candidates", "10"])["config"]
    assert (made["eos_reward"], made["num_candidates"]) == ("before", 10)
    assert "leave --eos-reward out" in call(capsys, [*to(decode, out="r.jsonl"), "--eos-reward", "state"], expect=1)
    # Answers that were made with other settings are not those of the tuned model.
    judge = [tuned if word == str(folder / "tune.json") else word for word in steps["evaluate"]]
    at = judge.index("--generations")
    judge = [*judge[:at], "--generations", str(tmp_path / "1.jsonl"), "--out", str(tmp_path / "result.json")]
    assert "was made with num_candidates 3, and the weight was tuned with 10" in call(capsys, judge, expect=1)
    files.write_json(tuned, {**plain, "num_candidates": 3})
    (tmp_path / "result.json.stage.json").unlink()
    assert "was made with eos_reward state, and the weight was tuned with before" in call(capsys, judge, expect=1)
    (tmp_path / "result.json.stage.json").unlink()
    record = files.read_json(tmp_path / "1.jsonl.stage.json")
    record["config"] |= {"whole_vocabulary": True}
    files.write_json(tmp_path / "1.jsonl.stage.json", record)
    assert "was made with num_candidates all, and" in call(capsys, judge, expect=1)
    # A weight of nobody's tuning goes with any setting.
    free = [*steps["zero"][: steps["zero"].index("--out")], "--out", str(tmp_path / "free.jsonl"), "--num-candidates", "2"]
    assert call(capsys, free)["config"]["num_candidates"] == 2
    for name in ("eos_reward", "num_candidates"):  # as older files are
        files.write_json(tuned, {key: value for key, value in plain.items() if key != name})
        assert f"'{name}' is missing" in call(capsys, to(decode, out="old.jsonl"), expect=1)


def test_a_weight_tuned_for_another_model_is_refused(stages, capsys, tmp_path):
    folder, steps = stages
    call(capsys, steps["train"])
    other = tmp_path / "tune.json"
    files.write_json(other, {"reward_weight": 1.0, "centre": 0.0, "model": "someone else's"})
    words = [str(other) if word == str(folder / "tune.json") else word for word in steps["decode"]]
    words[words.index("--out") + 1] = str(tmp_path / "answers.jsonl")
    assert "tuned for another model" in call(capsys, words, expect=1)
    files.write_json(other, {})
    assert "no file of `pyargs tune`" in call(capsys, words, expect=1)


def test_a_folder_is_no_file(tmp_path, capsys):
    with pytest.raises(PyargsError, match="is a folder: name a file"):
        files.write_text(tmp_path, "a table")
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(PyargsError, match="mine is a file: name a folder"), files.writing(tmp_path / "mine") as new:
        new.mkdir()
    assert (tmp_path / "mine").read_text() == "precious"


def test_nothing_foreign_is_ever_deleted(tmp_path, monkeypatch):
    (tmp_path / "rm").mkdir()
    (tmp_path / "rm/thesis.tex").write_text("precious")

    def save(path):
        with files.writing(path) as out:
            out.mkdir()
            (out / "config.json").write_text("{}")

    with pytest.raises(PyargsError, match="thesis.tex"):
        save(tmp_path / "rm")
    monkeypatch.chdir(tmp_path / "rm")
    for path in (".", "/", "..", str(tmp_path / "rm")):
        with pytest.raises(PyargsError):
            save(path)
    assert [p.name for p in (tmp_path / "rm").iterdir()] == ["thesis.tex"]
    save(tmp_path / "new")
    save(tmp_path / "new")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["config.json"]


def test_tuning_and_adaptation_read_their_own_split_only(stages, capsys):
    from pyargs.data import content_hash, load, of_split

    folder, steps = stages
    for verb in ("train", "adapt", "tune"):
        call(capsys, steps[verb])
    data = load("synthetic")
    for file, split in (("model", "support"), ("tune.json", "train_test")):
        record = files.read_json(folder / f"{file}.stage.json")
        assert record["inputs"]["data"] == content_hash(of_split(data, split))


@pytest.mark.parametrize("name", METHODS)
def test_the_smoke_profile_presets_what_it_says_and_flags_win(name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    plan = call(capsys, ["train", name, "--tiny", "--dry-run"])
    assert plan["backbone"] == "tiny-random" and plan["out"] == f"output/tiny/{name}" and plan["pairs"] > 0
    assert plan["steps"] == (0 if name == "icl" else 12)
    plan = call(capsys, ["train", name, "--tiny", "--out", "else", "--backbone", "other", "--dry-run"])
    assert plan["out"] == "else" and plan["backbone"] == "other"
    assert not any(tmp_path.iterdir())


def test_models_that_answer_by_themselves_take_no_policy_and_no_weight(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ["--data", "synthetic"]
    call(capsys, ["train", "icl", "--tiny", "--shots", "2"])
    call(capsys, ["adapt", "output/tiny/icl", *data, "--out", "icl"])
    few = [*data, "--limit", "2", "--max-new-tokens", "4"]
    assert "neither for" in call(capsys, ["decode", "icl", *few, "--reward-weight", "1", "--out", "a.jsonl"], expect=1)
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
