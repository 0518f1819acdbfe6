"""`pyargs decode` follows how the weight was tuned, and for which model."""

from __future__ import annotations

import pytest
from verbs import call

from pyargs import files, tuned


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


def test_what_computed_the_answers_is_written_down_and_another_backend_is_another_stage(stages, capsys, tmp_path, monkeypatch):
    folder, steps = stages
    for verb in ("train", "adapt"):
        call(capsys, steps[verb])
    words = [*steps["zero"][: steps["zero"].index("--out")], "--out", str(tmp_path / "eager.jsonl")]
    assert call(capsys, [*words, "--backend", "eager"])["config"]["backend"] == "eager"
    assert {line["backend"] for line in files.read_jsonl(tmp_path / "eager.jsonl")} == {"eager"}
    monkeypatch.setenv("PYARGS_BACKEND", "eager")
    assert call(capsys, words)["already_done"], "asked for otherwise, computed alike"
    monkeypatch.delenv("PYARGS_BACKEND")
    pytest.importorskip("pyargs._C")
    assert "other settings" in call(capsys, [*words, "--backend", "cpu"], expect=1)


def test_flags_of_sampling_are_followed_or_refused(stages, capsys, tmp_path):
    folder, steps = stages
    for verb in ("train", "adapt"):
        call(capsys, steps[verb])
    words = steps["zero"][: steps["zero"].index("--out")]
    ask = lambda name, *flags, **more: call(capsys, [*words, "--out", str(tmp_path / name), *flags], **more)  # noqa: E731
    assert "add --do-sample" in ask("refused.jsonl", "--temperature", "2", expect=1)
    assert "must be a finite number > 0" in ask("refused.jsonl", "--do-sample", "--temperature", "0", expect=1)
    best = [word for word in words if word not in ("--reward-weight", "0")] + ["--best-of", "2"]
    assert "samples anyway" in call(capsys, [*best, "--do-sample", "--out", str(tmp_path / "refused.jsonl")], expect=1)
    assert "eos_reward is about" in call(
        capsys, [*best, "--eos-reward", "state", "--out", str(tmp_path / "refused.jsonl")], expect=1
    )
    assert not (tmp_path / "refused.jsonl.stage.json").exists()
    ask("default.jsonl", "--do-sample")
    ask("same.jsonl", "--do-sample", "--temperature", "0.7", "--batch-size", "2")
    ask("other.jsonl", "--do-sample", "--temperature", "5")
    texts = [[line["text"] for line in files.read_jsonl(tmp_path / f"{name}.jsonl")] for name in ("default", "same", "other")]
    assert texts[0] == texts[1] != texts[2], "a prompt's answer depends on its number, not on the batch"


def test_what_was_tuned_stands_beside_the_model_and_is_used_where_no_weight_is_given(stages, capsys, tmp_path):
    """Argument before tuned before strength 1; the model stays the one that it is."""
    folder, steps = stages
    call(capsys, steps["train"])
    call(capsys, steps["adapt"])
    model, adapted = steps["tune"][1], steps["decode"][1]
    (files.Path(adapted) / files.TUNED).unlink(missing_ok=True)  # of another test
    to = lambda words, name: [*words[: words.index("--out")], "--out", str(tmp_path / name)]  # noqa: E731
    words = to(steps["decode"], "a.jsonl")
    at = words.index("--tuned")
    bare = [*words[:at], *words[at + 2 :]]
    unit = call(capsys, bare)["config"]["reward_weight"]
    assert call(capsys, [*to(bare, "b.jsonl"), "--strength", "3"])["config"]["reward_weight"] == pytest.approx(3 * unit)
    before = files.sha256(adapted)
    found = call(capsys, to(steps["tune"], "tune.json"))
    tuned.keep(model, adapted)
    assert files.sha256(adapted) == before and (files.Path(adapted) / files.TUNED).exists()
    assert call(capsys, to(bare, "c.jsonl"))["config"]["reward_weight"] == found["reward_weight"]
    assert call(capsys, [*to(bare, "d.jsonl"), "--strength", "1"])["config"]["reward_weight"] == pytest.approx(unit)
    # What was tuned for other weights is nobody's.
    noted = files.read_json(files.Path(adapted) / files.TUNED)
    files.write_json(files.Path(adapted) / files.TUNED, {key: {**one, "model": "another's"} for key, one in noted.items()})
    assert call(capsys, to(bare, "e.jsonl"))["config"]["reward_weight"] == pytest.approx(unit)
    assert "leave them out" in call(capsys, [*to(bare, "f.jsonl"), "--best-of", "2", "--strength", "1"], expect=1)


def test_a_policy_in_fewer_bits(stages, capsys, tmp_path):
    folder, steps = stages
    for verb in ("train", "adapt"):
        call(capsys, steps[verb])
    decode = [str(tmp_path / "int8.jsonl") if word == str(folder / "generations.jsonl") else word for word in steps["decode"]]
    decode = [word for word in decode if word not in ("--tuned", str(folder / "tune.json"))]
    assert call(capsys, [*decode, "--dtype", "int8"])["config"]["dtype"] == "int8"
    assert "GGUF" in call(capsys, [*decode[:-1], str(tmp_path / "file.jsonl"), "--dtype", "file"], expect=1)
