"""What `pyargs tune` found: in a file of its own, and beside the model for each policy."""

from __future__ import annotations

from pathlib import Path

from pyargs.config import check_kinds
from pyargs.errors import PyargsError
from pyargs.files import TUNED, read_json, weights_hash, write_json


def note(model: str | Path, policy: str, dtype: str, found: dict) -> None:
    """Writes what was found for this policy into the model's folder; what was found for other policies stays."""
    file = Path(model) / TUNED
    write_json(file, {**(read_json(file) if file.exists() else {}), f"{policy} {dtype}": found})


def noted(model: str | Path, policy: str, dtype: str) -> dict | None:
    """What was found for this policy; None if nothing was, or if the model in the folder has changed since."""
    file = Path(model) / TUNED
    kept = read_json(file).get(f"{policy} {dtype}") if file.exists() else None
    return kept if kept and kept.get("model") == weights_hash(model) else None


def keep(old: str | Path, new: str | Path) -> None:
    """Copies what was found to the folder where a model is saved again, with other users say."""
    if (Path(old) / TUNED).exists() and Path(old).resolve() != Path(new).resolve():
        write_json(Path(new) / TUNED, read_json(Path(old) / TUNED))


def read(file: str | Path, model: str | Path) -> dict:
    """The file of `pyargs tune` for this model. Raises PyargsError if it is another file, another model's, or does not say how
    candidates and stop tokens were rewarded, as older ones do not."""
    tuned = read_json(file)
    check_kinds(tuned, {"reward_weight": float, "centre": float, "model": str}, f"{file} is no file of `pyargs tune`")
    if tuned["model"] != weights_hash(model):
        raise PyargsError(f"{file} was tuned for another model than {model}: run `pyargs tune {model}`")
    check_kinds(
        tuned, {"num_candidates": int, "eos_reward": str | None}, f"{file} does not say all of its settings, tune again"
    )
    return tuned
