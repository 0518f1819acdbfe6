"""Models and runs from strangers: nothing that they name is run, imported or unpickled, and the refusal says why."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import pyargs
from pyargs import cli
from pyargs.data import of_split, synthetic
from pyargs.errors import PyargsError
from pyargs.lm import lora
from pyargs.lm.loading import load_lm
from pyargs.methods import global_rm, lore
from pyargs.training import adapt, hooks, trainer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of a backbone, folder of a model with LoRA trained on it)."""
    folder = tmp_path_factory.mktemp("inert")
    lm = str(synthetic.tiny_lm(folder / "lm", layers=1, width=32))
    config = lore.Config(backbone=lm, epochs=0.02, batch_size=4, rank=2, lora_rank=2, adapt_steps=2)
    trainer.train("lore", synthetic.load(), config).save_pretrained(folder / "rm")
    return folder / "lm", folder / "rm"


@pytest.fixture
def copy(made, tmp_path):
    for folder in made:
        shutil.copytree(folder, tmp_path / folder.name)
    return tmp_path / "lm", tmp_path / "rm"


def change(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_folder_does_not_choose_the_method_file_that_is_run(copy, trap, tmp_path, capsys):
    _, folder = copy
    code, mark = trap
    recipe = folder / "recipe.py"
    recipe.write_text(Path(lore.__file__).read_text() + code)
    change(folder / "config.json", method=str(recipe))
    support = synthetic.load()
    (tmp_path / "elsewhere.py").write_text(recipe.read_text())
    model = pyargs.load_model(folder)  # what is loaded can score; only adapting needs the method
    with pytest.raises(PyargsError, match=r"made by the file .*recipe\.py"):
        adapt.adapt(model, support)
    words = ["adapt", str(folder), "--data", "synthetic", "--out", str(tmp_path / "out")]
    assert cli.main(words) == 1
    assert "--method PATH" in capsys.readouterr().err and not mark.exists()
    recipe.unlink()
    adapt.adapt(pyargs.load_model(folder), support, method=str(tmp_path / "elsewhere.py"))
    assert mark.exists()
    mark.unlink()
    assert cli.main([*words, "--method", str(tmp_path / "elsewhere.py")]) == 0
    assert mark.exists()


@pytest.mark.parametrize("name", ["../../fit", "os", "", None, 3, ["lore"], "pyargs.methods.lore", "__init__"])
def test_only_names_of_methods_are_methods(copy, name):
    _, folder = copy
    change(folder / "config.json", method=name)
    with pytest.raises(PyargsError):
        adapt.adapt(pyargs.load_model(folder), synthetic.load())


def test_fields_of_a_method_are_of_their_kinds(copy):
    """All of the fields that a folder may say wrongly, each with several wrong values."""
    _, folder = copy
    model, rows = pyargs.load_model(folder), of_split(synthetic.load(), "support").select(range(2))
    model.users.append = lambda *_, **__: None  # or the second time the users would be there already
    fields, tried = dict(model.about["fields"]), 0
    for name, value in fields.items():
        for new in (None, "x", -1.5, [], {}, [None], True):
            model.about["fields"] = {**fields, name: new}
            if type(new) is not type(value) and not (value is None and new in ("x", -1.5)):
                tried += 1
                try:
                    adapt.adapt(model, rows, steps=0)
                except PyargsError:
                    pass
    assert tried > 100
    for broken in (None, [], {"strange": 1}):
        model.about["fields"] = broken
        with pytest.raises(PyargsError, match="do not fit"):
            adapt.adapt(model, rows)


@pytest.mark.parametrize("kind", ["folder", "os", "reward_model.RewardModel", "../evil", "", None, ["reward_model"], {}])
def test_only_kinds_of_models_and_heads_are_imported(copy, kind):
    _, folder = copy
    config = json.loads((folder / "config.json").read_text())
    for broken in ({**config, "kind": kind}, {**config, "head": {**config["head"], "kind": kind}}):
        (folder / "config.json").write_text(json.dumps(broken))
        with pytest.raises(PyargsError):
            pyargs.load_model(folder)


def test_a_method_file_takes_no_other_modules_place(tmp_path):
    file = tmp_path / "json.py"
    file.write_text(Path(global_rm.__file__).read_text())
    hooks.method(str(file))
    import json as still

    assert still is json and __import__("sys").modules["json"] is json


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (None, "'r'"),
        ({"r": None}, "'r'"),
        ({"r": 10**9}, "'r'"),
        ({"lora_alpha": "x"}, "lora_alpha"),
        ({"target_modules": None}, "target_modules"),
        ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "megatron"),
        ({"peft_type": "PREFIX_TUNING"}, "peft_type"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"use_dora": True}, "use_dora"),
        ({"auto_mapping": {"base_model_class": "X", "parent_library": "evil"}}, "auto_mapping"),
        ({"some_new_thing": "evil"}, "some_new_thing"),
    ],
)
def test_an_adapter_is_what_we_write_or_refused(copy, fields, named):
    _, folder = copy
    file = folder / lora.FILES[0]
    if fields is None:
        file.write_text("{}")
    else:
        change(file, **fields)
    with pytest.raises(PyargsError, match=named):
        pyargs.load_model(folder)


def test_an_adapter_beside_a_config_that_denies_it_is_refused(copy):
    _, folder = copy
    change(folder / "config.json", lora=False)
    with pytest.raises(PyargsError, match="adapter"):
        pyargs.load_model(folder)


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin", "training_args.bin", "x.pkl"])
def test_pickles_in_a_model_folder_are_refused_by_name(copy, trap, name):
    _, folder = copy

    class Trap:
        def __reduce__(self):
            return (exec, (trap[0],))

    (folder / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(PyargsError, match=name):
        pyargs.load_model(folder)
    assert not trap[1].exists()


def test_an_adapter_or_a_model_of_ours_is_no_backbone(copy):
    lm, folder = copy
    with pytest.raises(PyargsError, match="is an adapter"):
        load_lm(str(folder))
    (lm / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/else"}))
    with pytest.raises(PyargsError, match="is an adapter"):
        load_lm(str(lm))


def test_a_pickle_in_a_checkpoint_is_not_run(tmp_path, made, trap):
    class Trap:
        def __reduce__(self):
            return (exec, (trap[0],))

    config = global_rm.Config(backbone=str(made[0]), epochs=1.0, batch_size=64, lora_rank=2, checkpoint_steps=1)
    rows = synthetic.load().select(range(128))
    folder = tmp_path / "checkpoints"
    trainer.train("global_rm", rows, config, checkpoints=folder)
    shutil.rmtree(folder / "checkpoint-2")
    last = folder / "checkpoint-1"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        before = (last / name).read_bytes()
        torch.save(Trap(), last / name)
        with pytest.raises(PyargsError, match="checkpoint"):
            trainer.train("global_rm", rows, config, checkpoints=folder)
        assert not trap[1].exists(), name
        (last / name).write_bytes(before)
    save_file({"stranger": torch.zeros(1)}, last / "trained.safetensors")
    with pytest.raises(PyargsError, match="checkpoint"):
        trainer.train("global_rm", rows, config, checkpoints=folder)
