"""Files and folders under fire: a process killed at any file operation, two at once, a system that refuses."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
import signal
import stat
import sys
import time
from pathlib import Path

import pytest
from killed import killed_at
from rows import row

from pyargs import files
from pyargs.data import preferences
from pyargs.errors import PyargsError


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_folder(path: Path, tag: str) -> None:
    with files.writing(path, ("only-old",)) as out:
        out.mkdir()
        for name in ("config.json", "weights", *(["only-old"] if tag == "old" else [])):
            (out / name).write_text(f"{name} {tag}")
        (out / "inner").mkdir()
        (out / "inner/file").write_text(tag)


def write_file(path: Path, tag: str) -> None:
    files.write_json(path, {"tag": tag})


@pytest.mark.parametrize("write", [write_folder, write_file])
@pytest.mark.parametrize("there", [True, False])
def test_killed_at_any_file_operation_the_old_or_the_new_is_there_whole(tmp_path, write, there):
    """And the next run of the same target leaves nothing of the killed one beside it."""
    made = {}
    for tag in ("old", "new"):
        write(tmp_path / tag / "so", tag)
        made[tag] = contents(tmp_path / tag)
    number, seen = 0, set()
    for number in range(200):
        place = tmp_path / f"at {number}"
        place.mkdir()
        if there:
            write(place / "so", "old")
        if not killed_at(number, lambda place=place: write(place / "so", "new")):
            break
        files.settle(place / "so")
        found = contents(place)
        assert found in ([made["old"], made["new"]] if there else [{}, made["new"]]), (number, found)
        assert [one.name for one in place.iterdir()] in ([], ["so"])
        seen.add(found == made["new"])
        write(place / "so", "new")
        assert contents(place) == made["new"] and [one.name for one in place.iterdir()] == ["so"]
    else:
        pytest.fail("it never came to its end")
    assert number > 4 and seen == {False, True}


def test_what_a_living_process_writes_is_let_be(tmp_path):
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with files.writing(tmp_path / "so") as out:
            out.write_text("theirs")
            os.write(ready[1], b".")
            os.read(go[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    files.settle(tmp_path / "so")
    (theirs,) = tmp_path.iterdir()
    write_file(tmp_path / "so", "mine")
    assert theirs.exists() and files.read_json(tmp_path / "so") == {"tag": "mine"}
    os.write(go[1], b".")
    os.waitpid(child, 0)
    assert (tmp_path / "so").read_text() == "theirs" and [one.name for one in tmp_path.iterdir()] == ["so"]


def test_two_processes_on_one_folder_and_a_reader(tmp_path):
    """Whoever is last wins; nobody fails, nobody sees half a folder, nothing is left."""
    target, children = tmp_path / "so", []
    write_folder(target, "0")
    for writer in range(2):
        child = os.fork()
        if child == 0:
            try:
                for turn in range(25):
                    write_folder(target, f"{writer} {turn}")
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                os._exit(1)
            os._exit(0)
        children.append(child)
    for _ in range(200):
        assert any(target.exists() or files.settle(target) for _ in range(20))  # the next replacement may have begun
        time.sleep(0.001)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert [one.name for one in tmp_path.iterdir()] == ["so"]
    assert len({text.split(b" ", 1)[-1] for name, text in contents(target).items() if "/" not in name}) == 1


def test_folders_that_only_look_like_ours_are_let_be(tmp_path):
    others = (
        (".so.settings", "mine.toml"),
        (".so.versions", "so.1"),
        (".so.previous", "so"),
        (".so.ab.abcdefgh", "so"),
        (".other.abcdefgh", "other"),
    )
    for name, file in others:
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("precious")
    (tmp_path / ".so.notafold").write_text("precious")
    before = contents(tmp_path)
    write_file(tmp_path / "so", "new")
    (tmp_path / "so").unlink()
    assert contents(tmp_path) == before


def test_links_and_modes_stay(tmp_path):
    for write, real in ((write_file, tmp_path / "disk/file"), (write_folder, tmp_path / "disk/folder")):
        write(real, "first")
        link, mode = tmp_path / f"{real.name} link", 0o750 if real.is_dir() else 0o640
        real.chmod(mode)
        link.symlink_to(real)
        write(link, "second")
        assert link.is_symlink() and stat.S_IMODE(real.stat().st_mode) == mode
        assert "second" in str(contents(real.parent)) and "first" not in str(contents(real.parent))
    (tmp_path / "ahead").symlink_to("later/place")
    write_folder(tmp_path / "ahead", "new")
    assert (tmp_path / "later/place").is_dir() and (tmp_path / "ahead").is_symlink()
    secret = next(one for one in (tmp_path / "later/place").iterdir() if one.is_file())
    secret.chmod(0o600)
    write_folder(tmp_path / "ahead", "newer")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600


def test_places_that_are_no_output(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PyargsError, match="neither a file nor a folder"):
        write_file(tmp_path / "pipe", "new")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    monkeypatch.chdir(tmp_path)
    for place in ("", ".", "/"):
        with pytest.raises(PyargsError, match="name a file or a folder inside it"):
            files.finished(place, {"config": {}, "inputs": {}})
        with pytest.raises(PyargsError, match="name a file or a folder inside it"):
            write_file(Path(place), "new")
    with pytest.raises(PyargsError, match="is no path"):
        files.settle("a\0b")


def test_a_move_that_fails_keeps_the_old_folder(tmp_path, monkeypatch):
    write_folder(tmp_path / "so", "old")
    before, rename = contents(tmp_path), os.rename

    def refuse(source, target):
        if Path(target) == tmp_path / "so" and ".so." in str(source):
            raise OSError(errno.EIO, "Input/output error", str(target))
        return rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises((PyargsError, OSError)):
        write_folder(tmp_path / "so", "new")
    monkeypatch.undo()
    files.settle(tmp_path / "so")
    found = contents(tmp_path)
    assert found == before or found["so/config.json"] == b"config.json new"


def test_checkpoints_of_killed_runs_are_swept_and_those_of_living_ones_are_not(tmp_path):
    out, kept = tmp_path / "rm", []

    def train(key):
        with files.resumable(out, "checkpoints", key) as folder:
            (folder / "checkpoint-1").mkdir()
            kept.append(folder)
            os.kill(os.getpid(), signal.SIGKILL)

    for key in ("a", "b"):
        assert killed_at(10**9, lambda key=key: train(key))
    mine = tmp_path / "rm.checkpoints-notes"
    mine.mkdir()
    names = lambda: sorted(one.name for one in tmp_path.glob("rm.checkpoints-*"))  # noqa: E731
    assert len(names()) == 2  # b swept a
    with files.resumable(out, "checkpoints", "b") as folder:
        assert (folder / "checkpoint-1").exists() and len(names()) == 2
        with pytest.raises(PyargsError, match="another process is making"), files.resumable(out, "checkpoints", "b"):
            pass
        with files.resumable(out, "checkpoints", "c"):
            assert len(names()) == 3  # a living run of other settings
    assert names() == [mine.name]
    with pytest.raises(ZeroDivisionError), files.resumable(out, "checkpoints", "d"):
        raise ZeroDivisionError
    assert names() == [mine.name]
    shutil.rmtree(mine)


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.delenv("PYARGS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_dir() == tmp_path / "pyargs"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_dir() == tmp_path / ".cache" / "pyargs"


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


def test_json_without_end_is_refused_by_name(tmp_path, monkeypatch):
    good = json.dumps(row())
    for name, text, message in (
        ("digits.jsonl", good[:-1] + f', "n": {"9" * 5000}}}', "line 2.*digits"),
        ("twice.jsonl", good[:-1] + ', "chosen": "else"}', "line 2.*'chosen' stands twice"),
        ("inner.jsonl", good[:-1] + ', "x": [{"a": 1, "a": 2}]}', "line 2.*'a' stands twice"),
        ("deep.jsonl", "[" * 100_000, "line 2.*nested"),
    ):
        (tmp_path / name).write_text(f"{good}\n{text}\n")
        with pytest.raises(PyargsError, match=message):
            preferences.load(tmp_path / name)
        with pytest.raises(PyargsError, match=message):
            list(files.read_jsonl(tmp_path / name))
    with gzip.open(tmp_path / "bomb.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(40):
            file.write(b'"' + b"a" * (1 << 20))
    assert (tmp_path / "bomb.jsonl.gz").stat().st_size < 400_000
    with pytest.raises(PyargsError, match=r"bomb.*line 1 is longer than"):
        preferences.load(tmp_path / "bomb.jsonl.gz")
    monkeypatch.setattr(files, "LINE", 1 << 10)
    with gzip.open(tmp_path / "bomb.json.gz", "wb") as file:
        file.write(b"[" + b"\n" * (1 << 20))
    with pytest.raises(PyargsError, match="unfolds to more than"):
        files.read_text(tmp_path / "bomb.json.gz")
    (tmp_path / "plain.json").write_text("\n".join(["["] + ["1,"] * 5000 + ["1]"]))
    assert len(files.read_text(tmp_path / "plain.json")) > 10_000


def test_pipes_and_devices_are_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "link.json").symlink_to("/dev/zero")
    reads = files.read_json, files.read_text, files.read_tensors, files.sha256, lambda path: list(files.read_jsonl(path))
    for name in ("pipe.json", "link.json"):
        for read in reads:
            with pytest.raises(PyargsError, match=f"{name} is no regular file"):
                read(tmp_path / name)
        with pytest.raises(PyargsError, match=f"{name} is no regular file"):
            preferences.load(tmp_path / name)


def test_a_json_file_of_any_size_is_not_read_into_memory(tmp_path):
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(files.JSON + 1)  # takes no room on the disk
    with pytest.raises(PyargsError, match="large.json is larger than"):
        files.read_json(tmp_path / "large.json")
