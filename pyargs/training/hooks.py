"""Methods by name, and the defaults of their hooks.

A method is a module with `Config` and `build(lm, tokenizer, users, config)`. Everything else that training and adaptation call
is a hook with a default here.
"""

from __future__ import annotations

import importlib.util
import pkgutil
import sys
from pathlib import Path
from types import ModuleType

from pyargs.errors import PyargsError, did_you_mean


def _nothing(*_) -> None:
    pass


def _head_at_its_rate(model, config) -> list[dict]:
    return [{"params": model.head.parameters(), "lr": config.head_lr}] if hasattr(model, "head") else []


def _all_at_once(model, config) -> list[set]:
    return [{p for p in model.parameters() if p.requires_grad}]


def _read(model, rows):
    return model.read(rows)


DEFAULTS = {
    "loss": None,  # (model, batch, config) -> the loss, a scalar; without it nothing is trained
    "warm_start": _nothing,  # (model, rows, config): before the first step
    "parameter_groups": _head_at_its_rate,  # (model, config) -> those of the optimizer, beside LoRA's
    "turns": _all_at_once,  # (model, config) -> the sets of parameters that a minibatch updates in turn, a forward pass each
    "finish": _nothing,  # (model, config): behind the last step
    "support": _read,  # (model, rows of one user) -> what `adapt` is given
    "adapt": None,  # (model, support, [user], config) -> {kind of vector: [1, ...]}; without it users have no vectors
}


def method(name: str) -> ModuleType:
    """The module pyargs/methods/<name>.py, or the .py file at the path `name`. A file is run.

    So a path must come from the caller, never out of a saved file. Hooks that the module lacks come from `DEFAULTS`.
    """
    return with_defaults(_module(name))


def with_defaults(module: ModuleType) -> ModuleType:
    """Adds the hooks of `DEFAULTS` that a module lacks; returns it. Raises PyargsError for a hook by its old name."""
    if hasattr(module, "groups"):
        raise PyargsError(f"{module.__name__}: the hook groups is called parameter_groups now")
    for hook, default in DEFAULTS.items():
        vars(module).setdefault(hook, default)
    return module


def _module(name: str) -> ModuleType:
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise PyargsError(f"no method file {name}")
        own = f"pyargs_method_{Path(name).stem}"  # whatever the file is called, it takes no other module's place
        spec = importlib.util.spec_from_file_location(own, name)
        module = sys.modules[own] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module
    known = names()
    if name not in known:
        raise PyargsError(f"unknown method '{name}'.{did_you_mean(name, known)}")
    return importlib.import_module(f"pyargs.methods.{name}")


def names() -> list[str]:
    """The methods of the package: its files in `pyargs/methods`."""
    return [module.name for module in pkgutil.iter_modules([str(Path(__file__).parents[1] / "methods")])]


def method_of(model, given: str | None):
    """The method that made the model: `given`, which may be a .py file, else the name in the model's folder, which may not."""
    if given is not None:
        return method(given)
    name = model.about.get("method")
    if "labels" in model.about:
        raise PyargsError(
            "a sequence classifier learns no users from pairs: name a user's weights of its labels "
            f"({', '.join(model.about['labels'])}), as RewardModel.from_sequence_classifier says, or name a method=PATH"
        )
    if not isinstance(name, str) or name.endswith(".py"):
        raise PyargsError(
            f"this model was made by the file {name}, and a file that a model names is not run. Fix: if you trust that file, "
            "name it yourself: adapt(model, rows, method=PATH), or --method PATH"
        )
    return method(name)
