"""A method by its name, with the hooks that it leaves out."""

from __future__ import annotations

import importlib.util
import pkgutil
import sys
from pathlib import Path

from pyargs.errors import PyargsError, did_you_mean


def method(name: str):
    """The module pyargs/methods/<name>.py, or the file itself where `name` is a path to a .py file, which is run.

    So a path must come from the caller, never out of a file.
    """
    from pyargs import methods

    if name.endswith(".py"):
        if not Path(name).is_file():
            raise PyargsError(f"no method file {name}")
        own = f"pyargs_method_{Path(name).stem}"  # whatever the file is called, it takes no other module's place
        spec = importlib.util.spec_from_file_location(own, name)
        module = sys.modules[own] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module
    known = [m.name for m in pkgutil.iter_modules(methods.__path__)]
    if name not in known:
        raise PyargsError(f"unknown method '{name}'.{did_you_mean(name, known)}")
    return importlib.import_module(f"pyargs.methods.{name}")


def method_of(model, given: str | None):
    """The method that made the model: the caller's, who may name a file, else what its folder says, which may not."""
    if given is not None:
        return method(given)
    name = model.about.get("method")
    if not isinstance(name, str) or name.endswith(".py"):
        raise PyargsError(
            f"the model says that the file {name} made it, and what a model says is not run. Fix: if you trust that file, "
            "name it yourself: adapt(model, rows, method=PATH), or --method PATH"
        )
    return method(name)
