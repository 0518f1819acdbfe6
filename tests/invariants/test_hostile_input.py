"""What others wrote is refused in a line, or read for what it is: a sample of `make fuzz`, and what that has found."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from folders import make
from gguf_files import write_gguf
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from stacks import random_lm

import pyargs
from pyargs import files, tuned
from pyargs.data.synthetic import tiny_lm
from pyargs.errors import LONGEST, PyargsError
from pyargs.lm.loading import load_lm
from pyargs.methods import lore
from pyargs.models.reward_model import RewardModel
from pyargs.serve.wire import WireError

TESTS = Path(__file__).parents[1]


def test_a_sample_of_hostile_inputs():
    """In a process of its own: what breaks it, hangs it or fills the memory fails this test and no other."""
    words = [sys.executable, "-m", "fuzz", "--inputs", "40", "6", "--here", os.devnull]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]


# -- what was found ----------------------------------------------------------------------------------------------------


@given(st.text())
def test_a_message_is_one_line_whatever_it_quotes(text):
    for error in (PyargsError(f"unknown split '{text}'"), WireError(422, text, param=text)):
        said = getattr(error, "message", str(error))
        assert said.isprintable() and len(said) <= LONGEST
        said.encode()


def test_a_long_message_keeps_its_beginning_and_its_fix():
    said = str(PyargsError(f"{'x' * 10**6}: it is wrong. Fix: mend it"))
    assert said.startswith("xxx") and said.endswith("Fix: mend it") and len(said) <= LONGEST


@pytest.mark.parametrize("noted", [[], 3, {"p float32": "x"}, {"p float32": {"model": files.weights_hash("/none")}}])
def test_what_was_tuned_is_damaged(tmp_path, noted):
    (tmp_path / files.TUNED).write_text(json.dumps(noted))
    with pytest.raises(PyargsError, match=files.TUNED):
        tuned.noted(tmp_path, "p", "float32")


@pytest.mark.parametrize("field, value", [("max_length", "x"), ("rank", 2.5), ("lora_lr", float("nan")), ("pool", ["last"])])
def test_a_setting_of_another_kind_is_refused_by_name(field, value):
    with pytest.raises(PyargsError, match=field):
        lore.Config(**{field: value})


@pytest.mark.parametrize("text", ['["\\ud800"]', '{"\\udfff": 1}'])
def test_half_a_letter_in_json_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(PyargsError, match="x.json is not JSON"):
        files.read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('["\\ud83d\\ude00"]')
    assert files.read_json(tmp_path / "x.json") == ["\U0001f600"]


@pytest.fixture
def folder(backbone, tmp_path):
    make("reward", backbone).save_pretrained(tmp_path / "rm")
    return tmp_path / "rm"


def changed_json(file: Path, **fields) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_an_adapter_takes_no_memory_before_its_sizes_are_compared(folder, monkeypatch):
    """Its file may claim any rank: with no weights at all, with empty ones, with one small row of that rank."""
    large, taken = 10**7, torch.empty

    def small(*size, **more):
        made = taken(*size, **more)
        assert made.is_meta or made.numel() < large
        return made

    monkeypatch.setattr(torch, "empty", small)
    changed_json(folder / "adapter_config.json", r=large)
    file = folder / "adapter_model.safetensors"
    name, weight = next((name, value) for name, value in load_file(file).items() if "lora_A" in name)
    for saved in ({}, {name: torch.zeros(large, 0)}, {name: torch.tensor(1.0)}, {name: torch.zeros(large, 1)}):
        save_file(saved, file)
        with pytest.raises(PyargsError, match="adapter_"):
            pyargs.load_model(folder)
    assert weight.ndim == 2


def test_a_head_takes_no_memory_before_its_sizes_are_compared(folder, backbone):
    """Two sizes that tensors of the file have, and whose product none has: 400 GB."""
    shared = load_file(folder / "shared.safetensors")
    save_file({**shared, "long": torch.zeros(316_000)}, folder / "shared.safetensors")
    config = json.loads((folder / "config.json").read_text())
    for head in (
        {"kind": "linear", "dim": 316_000, "rank": 316_000, "softmax": True, "divisor": 1.0},
        {"kind": "distance", "dim": 316_000, "rank": 316_000, "width": 316_000, "residual": "input"},
        {"kind": "mlp", "dim": 316_000, "hidden": 316_000, "activation": "relu", "second": 316_000},
    ):
        changed_json(folder / "config.json", head=head)
        with pytest.raises(PyargsError) as raised:
            pyargs.load_model(folder)
        assert "not enough memory" not in str(raised.value) and "does not fit" in str(raised.value)
    changed_json(folder / "config.json", head=config["head"])
    save_file(shared, folder / "shared.safetensors")
    loaded = pyargs.load_model(folder)
    assert isinstance(loaded, RewardModel) and not any(one.is_meta for one in loaded.parameters())


@pytest.mark.parametrize("count", [2**62, 10**15])
def test_a_gguf_file_that_counts_more_than_it_holds(tmp_path, count):
    path = write_gguf(tmp_path, random_lm(), "F32", fields={"general.name": "x"})
    whole = path.read_bytes()
    name = b"general.name"
    start = whole.index(name) + len(name)
    for spoilt in (
        struct.pack("<IIQ", 9, 4, count),  # a list of numbers
        struct.pack("<IIQ", 9, 8, count),  # of texts
        struct.pack("<IIQ", 9, 9, count),  # of lists
        struct.pack("<IQ", 8, count),  # a text
    ):
        path.write_bytes(whole[:start] + spoilt + whole[start + len(spoilt) :])
        with pytest.raises(PyargsError, match="model.gguf"):
            load_lm(str(path))
    path.write_bytes(whole[:8] + struct.pack("<QQ", count, count) + whole[24:])
    with pytest.raises(PyargsError, match="model.gguf"):
        load_lm(str(path))


def test_a_gguf_file_of_more_layers_than_tensors(tmp_path):
    path = write_gguf(tmp_path, random_lm(), "F32")
    whole, name = path.read_bytes(), b"llama.block_count"
    start = whole.index(name) + len(name) + 4
    path.write_bytes(whole[:start] + struct.pack("<I", 2**31) + whole[start + 4 :])
    with pytest.raises(PyargsError, match="block_count"):
        load_lm(str(path))


@pytest.mark.parametrize("name", ["num_hidden_layers", "num_labels"])
def test_a_model_of_a_thousand_million_layers(tmp_path, name):
    folder = tiny_lm(tmp_path / "lm", layers=1, width=32, heads=2)
    changed_json(folder / "config.json", **{name: 10**9})
    with pytest.raises(PyargsError, match=name):
        load_lm(str(folder))


def test_a_tokenizer_that_reads_no_text_is_refused_when_it_is_loaded(tmp_path):
    folder = tiny_lm(tmp_path / "lm", layers=1, width=32, heads=2)
    changed_json(folder / "tokenizer_config.json", model_max_length="x")
    with pytest.raises(PyargsError, match="cannot load the model"):
        load_lm(str(folder))


@pytest.mark.parametrize("name", ["merges_file", "vocab", "vocab_file"])
def test_a_tokenizer_reads_no_file_of_elsewhere(tmp_path, name):
    folder = tiny_lm(tmp_path / "lm", layers=1, width=32, heads=2)
    (tmp_path / "secret").write_text("words")
    changed_json(folder / "tokenizer_config.json", **{name: str(tmp_path / "secret")})
    with pytest.raises(PyargsError, match=name):
        load_lm(str(folder))
