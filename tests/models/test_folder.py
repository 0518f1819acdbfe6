"""A model's folder: a backbone that was moved, another dtype, a folder that is replaced while it is read."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from folders import make, same
from killed import killed_at

import pyargs
from pyargs import files, tuned
from pyargs.data import synthetic
from pyargs.errors import PyargsError
from pyargs.files import write_json
from pyargs.lm import loading
from pyargs.lm.loading import load_lm


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


def test_who_was_trained_is_known_again(backbone, tmp_path):
    """Also of folders that name the adapted users in config.json, as those saved before do, or say nothing of them."""
    model = make("reward", backbone)
    names, twins = list(model.users.ids), {name: value.detach().clone() for name, value in model.users.vectors.items()}
    model.users.append(["new", "newer"], **twins)
    model.users.remove(["new"])
    folder = tmp_path / "rm"
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["trained"] == pyargs.load_model(folder).users.trained == len(names)
    del config["trained"]
    for adapted, trained in (({"adapted": ["newer", "gone"]}, len(names)), ({}, len(names) + 1)):
        write_json(folder / "config.json", config | adapted)
        again = pyargs.load_model(folder)
        assert again.users.trained == trained and "adapted" not in again.about and same(again, model)
    for wrong in ({"adapted": names[:1]}, {"trained": len(names) + 2}, {"trained": -1}):
        write_json(folder / "config.json", config | wrong)
        with pytest.raises(PyargsError, match="which of the 3 users were trained"):
            pyargs.load_model(folder)


def test_a_killed_note_of_the_weight_changes_no_model_and_hinders_nobody(backbone, tmp_path):
    """What `pyargs tune` notes in a model's folder is no part of it, nor is what is left where that is killed."""
    model, folder = make("reward", backbone), tmp_path / "rm"
    model.save_pretrained(folder)
    before, left = files.sha256(folder), 0
    for number in range(100):
        came_through = not killed_at(number, lambda: tuned.note(folder, "lm", "float32", {"reward_weight": 1.0}))
        left += any(one.name.startswith(f".{files.TUNED}") for one in folder.iterdir())
        assert files.sha256(folder) == before
        model.save_pretrained(folder)
        assert [one.name for one in folder.iterdir() if one.name.startswith(".")] == []
        if came_through:
            break
        (folder / files.TUNED).unlink(missing_ok=True)
    assert came_through and left and same(pyargs.load_model(folder), model)
