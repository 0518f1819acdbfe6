"""`pyargs data`: show, check, build."""

from __future__ import annotations

import json
import subprocess
import sys

from rows import row, tldr_source, write

from pyargs import cli


def test_show_command(tmp_path):
    path = write(tmp_path / "a.jsonl", [row(prompt=f"p{i}") for i in range(10)])
    command = [sys.executable, "-m", "pyargs.cli", "data"]
    shown = json.loads(subprocess.run([*command, "show", path], capture_output=True, check=True).stdout)
    assert shown["pairs"] == 10 and shown["splits"]["train_test"]["pairs"] == 2
    assert shown["words"]["chosen"] == {"min": 1, "median": 1.0, "mean": 1, "max": 1} and len(shown["sha256"]) == 64
    wrong = subprocess.run([*command, "show", "no-such"], capture_output=True, text=True)
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr
    assert subprocess.run(command, capture_output=True).returncode == 2


def test_build_command(tmp_path, capsys):
    def call(*words: str) -> tuple[int, dict, str]:
        try:
            code = cli.main(["data", "build", "tldr", "--source", source, *words])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, json.loads(out or "{}"), err

    source = str(tldr_source(tmp_path / "source"))
    options = ["--out", str(tmp_path / "out"), "--embedder", "none", "--support"]
    code, done, err = call(*options, "4")
    assert code == 0, err
    assert done["counts"]["train rows"] == 306 and (tmp_path / "out.stage.json").is_file()
    assert call(*options, "4")[1]["already_done"]
    code, _, err = call(*options[:-1])
    assert code == 1 and "other settings" in err
    assert call(*options, "4", "--k", "3")[0] == 2
    code, _, err = call("--out", str(tmp_path / "source" / "out"), "--support", "4")
    assert code == 1 and "inside the source" in err
    assert call("--out", str(tmp_path / "new"), "--support", "6")[0] == 1
    assert not (tmp_path / "new.stage.json").exists()


def test_users_who_share_their_pairs_are_no_fault(tmp_path, capsys):
    """Everybody judges everything, each in an own way: the point of personalisation."""
    pairs = [(u, i, (f"a{i}", f"b{i}")[:: 1 if u % 2 else -1]) for u in range(6) for i in range(8)]
    shared = write(
        tmp_path / "shared.jsonl",
        [
            row(
                user=f"u{u}",
                role="train" if u < 3 else ("support", "query")[i % 2],
                prompt=f"p{i}",
                chosen=one,
                rejected=other,
            )
            for u, i, (one, other) in pairs
        ],
    )
    assert cli.main(["data", "check", "--embedder", "none", str(shared)]) == 0
    assert "pairs of train users among the adapt users'" in json.loads(capsys.readouterr().out)["notes"]


def test_check_command(tmp_path):
    command = [sys.executable, "-m", "pyargs.cli", "data", "check", "--embedder", "none"]
    bad = write(tmp_path / "bad.jsonl", [row(role="support"), row(role="query")])
    ran = subprocess.run([*command, bad], capture_output=True, text=True)
    assert ran.returncode == 1 and "one pair in two splits of a user: 1" in ran.stderr
    assert json.loads(ran.stdout)["problems"]["one pair in two splits of a user"]["first"] == [
        "u1: bad.jsonl, line 1, bad.jsonl, line 2"
    ]
    ran = subprocess.run([*command, "demo"], capture_output=True, text=True)
    assert ran.returncode == 0 and json.loads(ran.stdout)["problems"] == {}
    ran = subprocess.run([*command, tmp_path / "none.jsonl"], capture_output=True, text=True)
    assert ran.returncode == 1 and "No file" in ran.stderr
