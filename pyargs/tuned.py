"""What `pyargs tune` found: in a file of its own, and beside the model for each policy."""

from __future__ import annotations

from pathlib import Path

from pyargs.config import check_kinds
from pyargs.errors import PyargsError
from pyargs.files import TUNED, read_json, weights_hash, write_json

WEIGHT = {"reward_weight": float, "centre": float, "model": str}
SETTINGS = {"num_candidates": int, "eos_reward": str | None}


def note(model: str | Path, policy: str, dtype: str, found: dict) -> None:
    """Writes what was found for this policy into the model's folder; what was found for other policies stays."""
    write_json(Path(model) / TUNED, {**every(model), f"{policy} {dtype}": found})


def every(model: str | Path) -> dict[str, dict]:
    """What the model's folder has noted, by policy and dtype. Raises PyargsError where its file is damaged."""
    file = Path(model) / TUNED
    found = read_json(file) if file.exists() else {}
    check_kinds({"found": found}, {"found": dict[str, dict]}, f"{file} was not written by `pyargs tune`, remove it")
    return found


def noted(model: str | Path, policy: str, dtype: str) -> dict | None:
    """What was found for this policy; None if nothing was, or if the model in the folder has changed since."""
    kept = every(model).get(f"{policy} {dtype}")
    if kept is None or kept.get("model") != weights_hash(model):
        return None
    check_kinds(kept, WEIGHT | SETTINGS, f"{Path(model) / TUNED} is damaged, remove it")
    return kept


def keep(old: str | Path, new: str | Path) -> None:
    """Copies what was found to the folder where a model is saved again, with other users say."""
    if (Path(old) / TUNED).exists() and Path(old).resolve() != Path(new).resolve():
        write_json(Path(new) / TUNED, every(old))


def read(file: str | Path, model: str | Path) -> dict:
    """The file of `pyargs tune` for this model. Raises PyargsError if it is another file, another model's, or does not say how
    candidates and stop tokens were rewarded, as older ones do not."""
    tuned = read_json(file)
    check_kinds(tuned, WEIGHT, f"{file} is no file of `pyargs tune`")
    if tuned["model"] != weights_hash(model):
        raise PyargsError(f"{file} was tuned for another model than {model}: run `pyargs tune {model}`")
    check_kinds(tuned, SETTINGS, f"{file} does not say all of its settings, tune again")
    return tuned
