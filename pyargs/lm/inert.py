"""Whether a folder of model files holds only numbers and settings: nothing that is run, imported or fetched on loading."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pyargs.errors import PyargsError
from pyargs.files import read_json

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
MODULES = ("Transformer", "Pooling", "Normalize", "Dense")
"""Parts of a sentence encoder; each is a class of sentence-transformers."""
COUNTED, MOST = re.compile("(layers?|labels|experts|codebooks|quantizers)$"), 4096
"""Settings that count modules or names."""


def check_inert(folder: Path) -> None:
    """Raises PyargsError, naming file and field, where `from_pretrained` of this folder would run or import what it names.

    For folders of transformers and of sentence-transformers. Pickled files are refused where they are the weights; what
    nothing reads (training_args.bin, say) may lie there.
    """
    _check_files(folder)
    if (folder / "modules.json").exists():
        for part in _parts(folder / "modules.json"):
            _check_files(part)  # which may be a link, that nothing follows from above


def _check_files(folder: Path) -> None:
    if (folder / "adapter_config.json").exists():
        raise PyargsError(
            f"{folder} is an adapter (adapter_config.json), which names the model it belongs to: merge it into that and save "
            "the whole model, or, if pyargs made it, give the folder as the trained model"
        )
    for name in ("config.json", "tokenizer_config.json", "sentence_*_config.json"):
        for file in folder.rglob(name):
            _check_settings(file)
    for file in folder.glob("*.safetensors.index.json"):
        _check_index(file)
    for file in folder.rglob("pytorch_model*.bin"):
        if not any(file.parent.glob("*.safetensors")):
            raise PyargsError(
                f"{file} holds pickled weights, which can run code when they are loaded: save the model as safetensors "
                "(model.save_pretrained of transformers does)"
            )


def _check_settings(file: Path) -> None:
    config = read_json(file)
    if not isinstance(config, dict):
        raise PyargsError(f"{file} is no JSON object")
    if "auto_map" in config:
        raise PyargsError(
            f"{file} has 'auto_map', which names code of the folder to be run, and pyargs runs none. Fix: if transformers has "
            f"a class of its own for {config.get('model_type', 'this model')!r}, remove 'auto_map' from the file"
        )
    _check_kernels(file, config)
    for name, value in config.items() if file.name == "tokenizer_config.json" else ():
        if isinstance(value, str) and (name in ("vocab", "merges") or name.endswith("_file")) and os.path.exists(value):
            raise PyargsError(f"{file}: '{name}' is {value!r}, a file of elsewhere: remove it")
    if file.name == "config.json":
        _check_counts(file, config)
    activation = config.get("activation_function", "")  # of a Dense: a class by name
    if "." in str(activation) and not str(activation).startswith("torch.nn.modules."):
        raise PyargsError(f"{file}: 'activation_function' is {activation!r}, which is no class of torch.nn")


def _check_counts(file: Path, config: dict) -> None:
    """Of what transformers makes one by one, before it compares with the weights."""
    for name, value in config.items():
        if COUNTED.search(name) and isinstance(value, int) and value > MOST:
            raise PyargsError(f"{file}: '{name}' is more than {MOST}, of which no model has so many")
        if isinstance(value, dict):
            _check_counts(file, value)


def _check_kernels(file: Path, config: dict) -> None:
    """Of the settings of parts, and of those that sentence-transformers hands on (model_kwargs), too."""
    for name, value in config.items():
        if name.strip("_").startswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
            raise PyargsError(f"{file}: '{name}' is {value!r}, a kernel to be fetched and run: remove it")
        if isinstance(value, dict):
            _check_kernels(file, value)


def _check_index(file: Path) -> None:
    """The files that hold the weights: of this folder, and no pickles."""
    index = read_json(file)
    names = index.get("weight_map") if isinstance(index, dict) else None
    for name in names.values() if isinstance(names, dict) else [names]:
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            raise PyargsError(f"{file}: weights are in safetensors files of this folder, not in {name!r}")


def _parts(file: Path) -> list[Path]:
    """The folders of a sentence encoder's modules."""
    modules = read_json(file)
    if not isinstance(modules, list) or not all(isinstance(one, dict) for one in modules):
        raise PyargsError(f"{file} is no list of modules")
    for one in modules:
        kind, path = str(one.get("type")), Path(str(one.get("path", "")))
        if not kind.startswith("sentence_transformers.") or kind.rpartition(".")[2] not in MODULES:
            raise PyargsError(
                f"{file}: a module of type '{kind}' would be imported by name; known are sentence_transformers' "
                + ", ".join(MODULES)
            )
        if path.is_absolute() or ".." in path.parts:
            raise PyargsError(f"{file}: the module path '{path}' leads out of the folder")
    return [file.parent / str(one.get("path", "")) for one in modules]
