"""Damaged files and a system that refuses: always a PyargsError that names what is wrong, never a traceback of Python's."""

from __future__ import annotations

import copy
import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from folders import make, same
from rows import row, write

import pyargs
from pyargs import cli, files
from pyargs.errors import PyargsError
from pyargs.lm import loading
from pyargs.lm.loading import load_lm

FEW = 60  # of the cases of each file; all of them (1048, 863, 301 and 482) take a minute


VALUES = (None, True, 0, -1, 10**9, 10**400, 1.5, "", "x", "../../x", [], {}, [None], {"x": {"y": []}})


def changed(value):
    """Every copy of a JSON value in which one thing is missing or another."""
    if isinstance(value, dict):
        for name in value:
            yield {other: kept for other, kept in value.items() if other != name}
            for new in (*VALUES, *changed(value[name])):
                if new != value[name] or type(new) is not type(value[name]):
                    yield {**value, name: new}
    elif isinstance(value, list):
        yield value[1:]
        yield [*value, value[0] if value else None]
        for number, one in enumerate(value):
            for new in (*VALUES[:6], *changed(one)):
                yield [*value[:number], new, *value[number + 1 :]]


@pytest.fixture
def quick(monkeypatch):
    """Loading the same backbone hundreds of times: once from the disk, then a copy."""
    loaded, load = {}, loading.load_lm

    def again(name, *, dtype, device=None):
        if (name, dtype) not in loaded:
            loaded[name, dtype] = load(name, dtype=dtype, device=device)
        lm, tokenizer = loaded[name, dtype]
        return copy.deepcopy(lm), tokenizer

    monkeypatch.setattr("pyargs.models.folder.load_lm", again)
    monkeypatch.setattr("pyargs.models.folder.fingerprint", lambda lm: expected)
    expected = None

    def trust(value):
        nonlocal expected
        expected = value

    return trust


@pytest.mark.parametrize("kind", ["reward", "token", "soft", "icl"])
def test_a_damaged_model_folder_is_refused_or_right(backbone, tmp_path, kind, quick):
    model = make(kind, backbone)
    model.save_pretrained(tmp_path / "rm")
    quick(model.about["fingerprint"])
    whole = {file.name: file.read_bytes() for file in (tmp_path / "rm").iterdir()}
    tried = refused = 0

    def attempt(what) -> None:
        nonlocal tried, refused
        tried += 1
        try:
            assert same(pyargs.load_model(tmp_path / "rm"), model), what
        except PyargsError as error:
            assert len(str(error)) > 10, what
            refused += 1
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error

    attempt("nothing")
    assert refused == 0
    for name, content in whole.items():
        file = tmp_path / "rm" / name
        if name.endswith(".json"):
            value = json.loads(content)
            cases = [*VALUES, *changed(value)]
            for new in random.Random(name).sample(cases, min(len(cases), FEW)):
                file.write_text(json.dumps(new))
                attempt((name, new))
            text = content.decode().rstrip()
            for broken in (b"", content[: len(content) // 2], b"\xff\xfe" + content, b"[" * 100_000, b"9" * 5000, b"\0"):
                file.write_bytes(broken)
                attempt((name, broken[:20]))
            if text.startswith("{"):
                first = json.dumps(next(iter(value)))
                file.write_text(f"{text[:-1]}, {first}: 1}}")
                with pytest.raises(PyargsError, match="stands twice"):
                    pyargs.load_model(tmp_path / "rm")
        else:
            for broken in (b"", content[: len(content) // 2], content[:9], b"\xff" * 100, content + b"x"):
                file.write_bytes(broken)
                attempt((name, broken[:20]))
        file.unlink()
        attempt((name, "missing"))
        file.mkdir()
        attempt((name, "a folder"))
        file.rmdir()
        file.write_bytes(content)
    assert tried > 100 and refused > tried / 2


def test_a_damaged_backbone_is_refused(backbone, tmp_path):
    lm, _ = load_lm(backbone)
    folder, tried = tmp_path / "lm", 0
    shutil.copytree(backbone, folder)
    for file in [one for one in folder.iterdir() if one.name != "generation_config.json"]:
        content = file.read_bytes()
        broken = [b"", content[: len(content) // 2], b"\xff\xfe\x00"]
        if file.name == "config.json":
            config = json.loads(content)
            broken += [
                json.dumps({**config, name: new}).encode()
                for name, new in (
                    ("model_type", "x"),
                    ("model_type", None),
                    ("hidden_size", -1),
                    ("hidden_size", "x"),
                    ("hidden_size", 48),
                    ("num_attention_heads", 0),
                    ("vocab_size", 10),
                    ("num_hidden_layers", 2),
                    ("quantization_config", {"quant_method": "x"}),
                )
            ]
        for new in (*broken, None):
            tried += 1
            file.unlink()
            if new is not None:
                file.write_bytes(new)
            try:
                again, _ = load_lm(str(folder))
                assert all(
                    torch.equal(a, b) for a, b in zip(lm.state_dict().values(), again.state_dict().values(), strict=True)
                )
            except PyargsError:
                pass
            file.write_bytes(content)
    assert tried > 20


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_saving_where_the_system_refuses(backbone, tmp_path, monkeypatch, number):
    model = make("soft", backbone)
    model.save_pretrained(tmp_path / "rm")
    before = {one.name: one.read_bytes() for one in (tmp_path / "rm").iterdir()}

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number), "there")

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(PyargsError, match="cannot be written.*Fix"):
        model.save_pretrained(tmp_path / "rm")
    with pytest.raises(PyargsError, match="cannot be written.*Fix"):
        files.write_json(tmp_path / "x.json", {})
    monkeypatch.undo()
    assert {one.name: one.read_bytes() for one in (tmp_path / "rm").iterdir()} == before
    assert [one.name for one in tmp_path.iterdir()] == ["rm"]


def test_a_disk_that_is_full_for_safetensors_too(backbone, tmp_path):
    """The limit on a file's size stands for a full disk; within it the tensors' own library fails."""
    import resource
    import signal

    model = make("soft", backbone)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            model.save_pretrained(tmp_path / "rm")
        except PyargsError as error:
            os._exit(7 if "Fix: make room" in str(error) else 8)
        except BaseException:
            os._exit(9)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, backbone, capsys):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("PYARGS_CACHE", str(tmp_path / "file/cache"))
    words = [
        "train",
        "lore",
        "--data",
        "synthetic",
        "--backbone",
        backbone,
        "--freeze-backbone",
        "--out",
        str(tmp_path / "rm"),
    ]
    assert cli.main(words) == 1
    assert "PYARGS_CACHE" in (said := capsys.readouterr().err) and str(tmp_path / "file") in said
    assert cli.main([*words[:4], "--backbone", "tiny-random", "--out", str(tmp_path / "file/rm")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    monkeypatch.delenv("PYARGS_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))
    from pyargs import files

    with pytest.raises(PyargsError, match="PYARGS_CACHE"):
        files.cache_dir()


def test_memory_that_is_not_there(backbone, monkeypatch):
    from transformers import AutoModelForCausalLM

    def refuse(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(PyargsError, match="not enough memory"):
        load_lm(backbone)


@pytest.mark.parametrize("words", [["data", "show", "é.jsonl"], ["adapt", "modèle", "--data", "demo", "--out", "x"]])
def test_a_locale_without_the_letters_of_a_path(words, tmp_path):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    write(tmp_path / "é.jsonl", [row()])
    words = [str(tmp_path / word) if "." in word else word for word in words]
    done = subprocess.run([sys.executable, "-m", "pyargs.cli", *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "PYTHONUTF8=1" in done.stderr and "Traceback" not in done.stderr
