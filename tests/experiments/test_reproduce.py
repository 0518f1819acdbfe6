"""The grid: every command of every profile is understood; a killed run goes on and neither redoes nor loses a cell."""

from __future__ import annotations

import json

import pytest
from cells import EXPERIMENTS

from experiments import reproduce, rules
from experiments.__main__ import main
from pyargs import cli, files


@pytest.mark.parametrize("profile", ["smoke", "cpu", "gpu", "paper"])
def test_every_command_is_understood_and_every_cell_has_a_file_of_its_own(profile, places):
    cells = reproduce.cells(profile)
    assert len({reproduce.result_file(cell, places) for cell in cells}) == len(cells) > 20
    settings = reproduce.PROFILES[profile]
    for cell in {(c.set, c.row): c for c in cells}.values():
        if cell.row in reproduce.NO_POLICY:
            continue
        for stage, (verb, *words) in reproduce.stages(cell, places).items():
            known = vars(cli.parse(verb, words)[1])  # exits on a flag or a value that does not exist
            assert stage in ("train", "adapt", "tune", "decode", "evaluate") and not any("{" in str(v) for v in known.values())
    for name, one in settings["sets"].items():
        rows = {cell.row for cell in cells if cell.set == name}
        assert rows == set(one["rows"]) and set(one["once"]) <= rows
        for row in rows - set(one["once"]) - {"Zero-Shot", *reproduce.NO_POLICY, "ARGS, weight 0"}:
            seeds = {cell.seed for cell in cells if (cell.set, cell.row) == (name, row)}
            assert seeds == set(settings["seeds"]), f"{name}, {row}: a row has each of the profile's seeds"
        if "build" in one:
            dataset, *words = one["build"]
            cli.parse("data", ["build", dataset, *words, "--out", "x"])


@pytest.fixture
def smoke(places, monkeypatch, encoder):
    """A cell of the smoke profile, and what was really done of its stages, a line each."""
    monkeypatch.setitem(reproduce.PROFILES["smoke"]["sets"]["synthetic"], "bertscore", encoder)
    plain, done = reproduce.command, []

    def command(verb, *words):
        found = plain(verb, *words)
        if not found.get("already_done"):
            done.append(verb)
        return found

    monkeypatch.setattr(reproduce, "command", command)
    return reproduce.Cell("smoke", "synthetic", "tiny-random", "LoRE", 0), done


def test_a_killed_cell_goes_on_where_it_was(smoke, places, monkeypatch):
    """Killed behind each of its stages, of which the unguided row's come first. `tests/faults` kills within them, and compares
    what comes out."""
    cell, done = smoke
    command = reproduce.command

    class Killed(BaseException):
        pass

    for last in ("train", "adapt", "tune", "decode", "evaluate"):

        def killed(verb, *words, last=last):
            found = command(verb, *words)
            if verb == last and "lore" in " ".join(words):
                raise Killed
            return found

        monkeypatch.setattr(reproduce, "command", killed)
        with pytest.raises(Killed):
            reproduce.run(cell, places)
        assert not reproduce.result_file(cell, places).exists() and not reproduce.done(cell, places)
    monkeypatch.setattr(reproduce, "command", command)
    found = reproduce.run(cell, places)
    assert done == ["train", "adapt", "decode", "train", "adapt", "tune", "decode", "evaluate"], "a stage was done twice"
    assert reproduce.done(cell, places) and files.read_json(reproduce.result_file(cell, places)) == json.loads(
        json.dumps(found)
    )
    # Of other data or settings the numbers would be others: such a cell is not done. Nor is one that is damaged.
    old = files.read_json(reproduce.result_file(cell, places))
    for name in ("data", "row", "tune", "models", "stands_for", "compared_with", "recipe"):
        files.write_json(reproduce.result_file(cell, places), {**old, "key": {**old["key"], name: "other"}})
        assert not reproduce.done(cell, places)
    # A field that came later has the default by which older cells were made; a rule that came later says what it touches.
    method, fields = old["key"]["row"]
    earlier = {name: value for name, value in fields.items() if name != "max_grad_norm"}
    files.write_json(
        reproduce.result_file(cell, places), {**old, "key": {**old["key"], "recipe": 2, "row": [method, earlier]}}
    )
    assert reproduce.done(cell, places)
    files.write_json(
        reproduce.result_file(cell, places), {**old, "key": {**old["key"], "row": [method, fields | {"gone": 1}]}}
    )
    assert reproduce.stale(cell, places) == ["other row"]
    files.write_json(reproduce.result_file(cell, places), {**old, "method": "vpl", "key": {**old["key"], "recipe": 2}})
    assert reproduce.stale(cell, places) == [
        f"older rule: {next(rule.before for rule in rules.RULES if 'VPL' in rule.before)}"
    ]
    damaged = ["", "[]", "{}", '{"key"', '{"key": "abc"}', '{"key": {}, "values": {}}', "\ud800"]
    damaged += [f'{{"key": {{"recipe": 2}}, "values": {{}}, "{name}": 5}}' for name in ("seconds", "tune", "fields")]
    for text in (one.encode("utf-8", "surrogatepass") for one in damaged):
        reproduce.result_file(cell, places).write_bytes(text)
        assert not reproduce.done(cell, places) and not reproduce.done(cell, places, built=False)
        assert not reproduce.written(cell, places)
    # With other settings the stages that depend on them are made again, and no others.
    del done[:]
    settings = reproduce.PROFILES["smoke"]["sets"]["synthetic"]
    monkeypatch.setitem(settings, "tune", [*settings["tune"], "--seed", "1"])
    assert reproduce.run(cell, places)["key"]["tune"][-1] == "1" and reproduce.done(cell, places)
    assert done == ["decode", "tune", "decode", "evaluate"], "the unguided answers once more, but no training"
    monkeypatch.setitem(settings["rows"], "Zero-Shot", ("icl", {"shots": 0, "max_length": 1024}))
    assert not reproduce.done(cell, places), "its win rate is over other answers now"


@pytest.mark.parametrize("quoted", [0, 3, 7, 8, 20])
def test_an_answer_that_quotes_its_prompt_loses_its_text(quoted):
    from pyargs.metrics.overlap import copied

    prompt = " ".join(f"word{i}" for i in range(30))
    text = " ".join([*prompt.split()[5 : 5 + quoted], "and", "something", "of", "its", "own"])
    run, length = copied(text.upper(), ["nothing about this", prompt])
    assert (run, length) == (quoted, quoted + 5)
    own = {"text": text, "copied": run, "words": length, "digest": "d"}
    kept = reproduce.without_quotation({**own, "quotes": False})
    assert kept["text"] == (text if quoted < 8 else None) and kept["digest"] == "d"
    assert reproduce.without_quotation({**own, "quotes": True}) == {**own, "text": None}
    whole = {"text": "word3 word4", "copied": 2, "words": 2, "quotes": False}
    assert reproduce.without_quotation(whole)["text"] is None, "nothing of it is ours"
    assert reproduce.without_quotation({"text": "", "copied": 0, "words": 0, "quotes": False})["text"] == ""


def test_a_cell_holds_no_text_of_the_data(smoke, places):
    import pyargs.data

    cell, _ = smoke
    rows = pyargs.data.of_split(pyargs.data.load("synthetic"), "query")
    text = json.dumps(reproduce.run(cell, places))
    assert rows[0]["pair_id"] in text and rows[0]["user_id"] in text
    for row in rows:
        assert not any(json.dumps(row[name])[1:-1] in text for name in ("chosen", "rejected") if len(row[name].split()) > 4)


def test_a_dry_run_begins_nothing_and_missing_data_are_said(tmp_path, capsys):
    words = ["--shared", tmp_path / "nowhere", "--work", tmp_path / "work", "--results", tmp_path / "results"]
    words = [str(word) for word in words]
    assert main(["reproduce", "smoke", "--dry-run", *words]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["cells"]) == len(reproduce.cells("smoke")) and plan["tokens"] > 0 and plan["hours"] is None
    assert "would fit" in plan["note"] and not list(tmp_path.iterdir())
    # A set that is not built yet is taken as it was counted, and a cell that came with the project as done.
    assert main(["reproduce", "gpu", "--dry-run", *words]) == 0
    plan = json.loads(capsys.readouterr().out)
    sizes = plan["sets"]["pref_lamp"]
    assert sizes["users"] == 611 and sizes["pairs"]["query"] > 1000 and "no data at" in sizes["not there yet"]
    tokens = {line["cell"].split(" / ")[2]: line["tokens"] for line in plan["cells"]}
    assert tokens["GenARM"] > tokens["LoRE"] > tokens["Zero-Shot"] > sizes["pairs"]["query"] * sizes["prompt_tokens"]
    words[-1] = str(EXPERIMENTS / "results")
    (tmp_path / "nowhere/pref_lamp_like/ci").mkdir(parents=True)
    assert main(["reproduce", "cpu", "--sets", "same_content", "--dry-run", *words]) == 0
    plan = json.loads(capsys.readouterr().out)
    rows = [line["cell"].split(" / ")[2] for line in plan["cells"]]
    assert plan["done"] + len(rows) == len([cell for cell in reproduce.cells("cpu") if cell.set == "same_content"])
    for row, line in zip(rows, plan["cells"], strict=True):  # what is there is left only for a reason that is said
        why = line.get("made_again", [])
        assert all(one.startswith("older rule: ") or row == "Zero-Shot" for one in why) and bool(why) == (row != "VPL, mu"), (
            line
        )
    assert plan["done"] > 15 and rows.count("VPL") == 3
    said = plan["sets"]["same_content"]["not there yet"]
    assert said.startswith("is built first: pyargs data build pref_lamp --source") and "{" not in said and "--out" in said
    # The rates are those of all rows of the set, whichever are asked for.
    shared = EXPERIMENTS.parent.parent / "shared/data"
    if shared.is_dir():
        line = [
            "reproduce",
            "cpu",
            "--only",
            "ICL-RAG, 16 shots",
            "--dry-run",
            "--shared",
            str(shared),
            "--results",
            str(EXPERIMENTS / "results"),
        ]
        assert main(line) == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["done"] == 1 or plan["hours"] > 0.05
    assert main(["reproduce", "cpu", "--sets", "length_prefs", *words]) == 0
    out = capsys.readouterr()
    assert "no data at" in out.err and json.loads(out.out)["cells"] == 0
    assert main(["reproduce", "cpu", "--only", "LoRa", *words]) == 1
    assert "Did you mean: LoRE" in capsys.readouterr().err
    assert main(["reproduce", "smoke", "--seeds", "7", *words]) == 1
    assert "its seeds are [0]" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["reproduce", "smoke", "--workers", "0", *words])


def test_a_cell_that_fails_does_not_stop_the_others(tmp_path, capsys):
    cell = reproduce.Cell("smoke", "synthetic", "tiny-random", "LoRE", 0)
    taken = reproduce.model_folder(cell, reproduce.Places(tmp_path, tmp_path / "work", tmp_path / "results")) / "seen"
    taken.mkdir(parents=True)
    (taken / "somebody's.txt").write_text("not ours")
    words = [
        "reproduce",
        "smoke",
        "--only",
        "LoRE",
        "word overlap",
        "--work",
        str(tmp_path / "work"),
        "--results",
        str(tmp_path / "results"),
    ]
    with pytest.raises(SystemExit, match="1"):
        main(words)
    out = capsys.readouterr()
    assert "was not written by this command" in out.err
    assert json.loads(out.out)["failed"] == ["synthetic / tiny-random / LoRE / seed 0"]
    assert (tmp_path / "results/smoke/synthetic/tiny-random/word-overlap-0.json").exists()
