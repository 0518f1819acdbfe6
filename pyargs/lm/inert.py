"""Whether a folder of model files holds only numbers and settings: nothing that is run, imported or fetched on loading."""

from __future__ import annotations

from pathlib import Path

from pyargs.errors import PyargsError
from pyargs.files import read_json

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
MODULES = ("Transformer", "Pooling", "Normalize", "Dense")
"""Parts of a sentence encoder; each is a class of sentence-transformers."""


def check_inert(folder: Path) -> None:
    """Raises PyargsError, naming file and field, where `from_pretrained` of this folder would run or import what it names.

    For folders of transformers and of sentence-transformers. Pickled files are refused where they are the weights; what
    nothing reads (training_args.bin, say) may lie there.
    """
    if (folder / "adapter_config.json").exists():
        raise PyargsError(
            f"{folder} is an adapter (adapter_config.json), which names the model it belongs to: merge it into that and save "
            "the whole model, or, if pyargs made it, give the folder as the trained model"
        )
    for file in [*folder.rglob("config.json"), *folder.rglob("tokenizer_config.json")]:
        _check_settings(file)
    if (folder / "modules.json").exists():
        _check_modules(folder / "modules.json")
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
    for name in ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"):
        if "/" in str(config.get(name)):
            raise PyargsError(f"{file}: '{name}' is {config[name]!r}, a kernel to be fetched and run: remove it")
    activation = config.get("activation_function", "")  # of a Dense: a class by name
    if "." in str(activation) and not str(activation).startswith("torch.nn.modules."):
        raise PyargsError(f"{file}: 'activation_function' is {activation!r}, which is no class of torch.nn")


def _check_modules(file: Path) -> None:
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
