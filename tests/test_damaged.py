"""Damaged files and a system that refuses: always a PyargsError that names what is wrong, never a traceback of Python's."""

from __future__ import annotations

import copy
import errno
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import reward_model, tiny_lm
from rows import row, write

import pyargs
from pyargs import cli, files
from pyargs.data import preferences, synthetic
from pyargs.errors import PyargsError, refusal
from pyargs.heads import linear
from pyargs.lm import loading, lora
from pyargs.lm.loading import fingerprint, load_lm
from pyargs.models.demonstrations import Demonstrations
from pyargs.models.reward_model import RewardModel
from pyargs.models.token_reward import TokenReward
from pyargs.models.user_policy import SoftPrompt, UserPolicy
from pyargs.types import Users

# -- every field and every file of a model folder ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return str(synthetic.tiny_lm(tmp_path_factory.mktemp("damaged") / "lm", layers=1, width=32, heads=2))


def make(kind: str, folder: str):
    lm, tokenizer = load_lm(folder)
    torch.manual_seed(0)
    decoder, about = lm.get_decoder(), {"method": kind, "fields": {"seed": 0}, "backbone": folder, "dtype": "float32"}
    about |= {"fingerprint": fingerprint(decoder), "max_length": 64}
    users = lambda **vectors: Users(["ann", "bob"], **vectors)  # noqa: E731
    if kind in ("reward", "token"):
        lora.add(decoder, rank=2, alpha=4, rslora=True, target_modules=None)
    if kind == "reward":
        head = linear.Head(32, 3, users(mixture=torch.randn(2, 3)), softmax=True, divisor=10.0)
        return RewardModel(decoder, tokenizer, head, about=about)
    if kind == "token":
        return TokenReward(lm, tokenizer, about=about)
    if kind == "soft":
        return UserPolicy(
            lm, tokenizer, soft=SoftPrompt(torch.randn(1, 2, 32), users(offset=torch.randn(2, 2, 32))), about=about
        )
    shown = {"ann": [{"prompt": "p", "chosen": "c", "rejected": "r"}]}
    demonstrations = Demonstrations(
        shots=1, retrieve="random", show="pair", content_tokens=20, instruction="", max_tokens=60, seed=0, of_user=shown
    )
    return UserPolicy(lm, tokenizer, demonstrations=demonstrations, about=about)


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


def same(one, other) -> bool:
    """Whether two models hold the same tensors and users."""
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


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


# -- a backbone that was moved -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["reward", "token", "soft"])
def test_a_moved_backbone_is_named_and_checked(backbone, tmp_path, kind):
    lm = tmp_path / "there/lm"
    shutil.copytree(backbone, lm)
    model = make(kind, str(lm))
    model.save_pretrained(tmp_path / "rm")
    shutil.move(lm, tmp_path / "here")
    with pytest.raises(PyargsError, match=r"no such folder.*backbone=PATH"):
        pyargs.load_model(tmp_path / "rm")
    again = pyargs.load_model(tmp_path / "rm", backbone=tmp_path / "here")
    assert same(again, model)
    again.save_pretrained(tmp_path / "rm")
    assert same(pyargs.load_model(tmp_path / "rm"), model)  # it says where the backbone lies now
    other = synthetic.tiny_lm(tmp_path / "other", layers=1, width=32, heads=2, seed=5)
    with pytest.raises(PyargsError, match="not those that this model was trained on"):
        pyargs.load_model(tmp_path / "rm", backbone=str(other))


def test_a_model_is_loaded_in_another_dtype(backbone, tmp_path):
    model = make("reward", backbone)
    model.save_pretrained(tmp_path / "rm")
    again = pyargs.load_model(tmp_path / "rm", dtype="bfloat16")
    dtypes = {name: value.dtype for name, value in again.backbone.state_dict().items()}
    assert all(dtype == (torch.float32 if "lora_" in name else torch.bfloat16) for name, dtype in dtypes.items())
    again.save_pretrained(tmp_path / "again")
    assert same(pyargs.load_model(tmp_path / "again"), model)  # the dtype of the training is still known
    with pytest.raises(PyargsError, match="keeps its dtype"):
        pyargs.load_model(tmp_path / "rm", backbone=load_lm(backbone)[0].get_decoder(), dtype=torch.bfloat16)
    for dtype in ("float33", "load", 3, torch.int8):
        with pytest.raises(PyargsError, match="dtype is"):
            pyargs.load_model(tmp_path / "rm", dtype=dtype)


def test_a_folder_that_is_replaced_while_it_is_read_is_not_mixed(backbone, tmp_path, monkeypatch):
    model = make("soft", backbone)
    model.save_pretrained(tmp_path / "rm")
    load = loading.load_lm
    monkeypatch.setattr(
        "pyargs.models.folder.load_lm", lambda *names, **more: model.save_pretrained(tmp_path / "rm") or load(*names, **more)
    )
    with pytest.raises(PyargsError, match="replaced while it was read"):
        pyargs.load_model(tmp_path / "rm")


# -- data --------------------------------------------------------------------------------------------------------------


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


def test_parquet_with_bytes_that_are_no_text(tmp_path):
    import pyarrow
    import pyarrow.parquet

    def save(name, **columns):
        table = pyarrow.table({**{k: [v] for k, v in row().items()}, **columns})
        pyarrow.parquet.write_table(table, tmp_path / name)
        return tmp_path / name

    bad = pyarrow.array([b"\xff\xfe"], pyarrow.binary()).view(pyarrow.utf8())
    with pytest.raises(PyargsError, match=r"bad\.parquet is damaged"):
        preferences.load(save("bad.parquet", prompt=bad))
    with pytest.raises(PyargsError, match="prompt is bytes"):
        preferences.load(save("bytes.parquet", prompt=pyarrow.array([b"x"], pyarrow.binary())))
    table = pyarrow.table([["a"], ["b"]], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(PyargsError, match="'prompt' stands twice"):
        preferences.load(tmp_path / "twice.parquet")


# -- what the system refuses -------------------------------------------------------------------------------------------


def test_what_the_system_refuses_has_a_sentence():
    from safetensors import SafetensorError

    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    for error, part in (
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "/x: No space left on device. Fix: make room"),
        (full, "Fix: make room"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "Fix: allow it, or name a place that can be written"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "PYARGS_CACHE"),
        (
            RuntimeError("[enforce fail at inline_container.cc:668] . PytorchStreamWriter failed writing file data/0"),
            "make room",
        ),
        (ImportError("x.so: failed to map segment from shared object"), "not enough memory"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory"),
        (RuntimeError("unable to mmap 512 bytes from file </x>: Cannot allocate memory (12)"), "not enough memory"),
        ("ü".encode, "PYTHONUTF8=1"),
    ):
        if callable(error):
            try:
                error("ascii")
            except UnicodeEncodeError as raised:
                error = raised
        assert part in refusal(error) and "\n" not in refusal(error)
    for error in (ValueError("x"), RuntimeError("x"), PyargsError("no memory"), KeyError("x")):
        assert refusal(error) is None


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


# -- decoding ----------------------------------------------------------------------------------------------------------


def test_a_policy_with_more_tokens_than_the_reward_model_knows():
    policy = tiny_lm(vocab=80)
    model = reward_model(tiny_lm(vocab=61))
    with pytest.raises(PyargsError, match=r"80 tokens.*knows 61.*tokenizer="):
        pyargs.generate(policy, model, torch.tensor([[5, 6]]), None, ["ann"], reward_weight=1.0, max_new_tokens=2)
