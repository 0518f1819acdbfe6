"""A trained model as a folder: config.json, shared weights, users, LoRA adapter, card. Never the backbone itself."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pyargs import __version__, tuned
from pyargs.config import check_kinds
from pyargs.errors import PyargsError
from pyargs.files import TUNED, read_json, read_tensors, settle, short_hash, weights_hash, write_json, writing
from pyargs.lm import lora
from pyargs.lm.inert import PICKLED
from pyargs.lm.loading import default_device, fingerprint, load_classifier, load_lm, torch_dtype
from pyargs.types import START, Users

KINDS = {
    "reward_model": {"pool": str, "step_reward": str, "whole": bool, "apart": bool, "head": dict},
    "token_reward": {},
    "user_policy": {"soft": bool, "demonstrations": dict | None},
}
"""By module of `pyargs.models`: the fields of its config.json beside those of ALWAYS."""
ALWAYS = {"kind": str, "lora": bool, "users": dict[str, list[int]]}
ABOUT = {
    "backbone": str,
    "dtype": str,
    "fingerprint": str,
    "method": str,
    "fields": dict,
    "max_length": int | None,
    "closed": bool,  # of a reward_model; folders of before lack it
    "labels": list[str],
    "trained": int,
    "adapted": list[str],
    "reward_std": dict[str, float],  # by fingerprint of a policy's decoder
}
"""Optional fields of config.json."""
TABLE = "table.json"
"""In a folder of users that were pushed apart from their model: which model that is, and how many of them were trained."""

CARD = """---
library_name: pyargs
base_model: {backbone}
tags: [{kind}, personalization]
---
# Personalized {kind}: {method}

{users} users on the backbone `{backbone}`{lora}. Made with pyargs {version}; load it with
`pyargs.load_model(folder)`.{scale}
"""


def save(
    folder: str | Path, kind: str, model, shared: dict[str, Tensor], users: Users, *, extra: dict | None = None, **config
) -> None:
    """Writes a model; a killed process leaves the old folder or the new one.

    kind: the module of `pyargs.models`; model: has `about` and `backbone` (a decoder, whose LoRA is saved); shared: tensors
    that all users share; extra: more JSON files by name; config: what `kind` needs to build the model again.
    """
    settle(Path(folder) / TUNED)  # what a killed run left there
    with writing(folder, (*lora.FILES, "demonstrations.json", START, TUNED)) as out:
        out.mkdir()
        tuned.keep(folder, out)
        adapted = lora.save(model.backbone, out)
        save_file(shared, out / "shared.safetensors")
        users.save(out)
        for name, value in (extra or {}).items():
            write_json(out / name, value)
        write_json(
            out / "config.json",
            {
                "pyargs": __version__,
                "kind": kind,
                **model.about,
                **config,
                "lora": adapted,
                "users": _shapes(users),
                "trained": users.trained,
            },
        )
        card = CARD.format(
            backbone=model.about.get("backbone"),
            method=model.about.get("method"),
            users=len(users) or "all",
            kind=kind.replace("_", " "),
            lora=" with a LoRA adapter" if adapted else "",
            version=__version__,
            scale="" if kind == "user_policy" else " Rewards compare responses to one prompt; their scale means nothing else.",
        )
        (out / "README.md").write_text(card, encoding="utf-8")


def locate(folder: str | Path) -> Path:
    """The local folder: `folder` itself, or the download of a hub name."""
    settle(folder)
    if Path(folder).is_dir():
        return Path(folder)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(folder)))
    except Exception as error:
        raise PyargsError(f"'{folder}' is neither a local folder nor within reach on the hub: {error}") from error


def read_config(folder: Path, kind: str | None = None) -> dict:
    """config.json of a saved model. Raises PyargsError for another kind of model."""
    file, config = folder / "config.json", read_json(folder / "config.json")
    if not isinstance(config, dict) or "kind" not in config:
        raise PyargsError(f"{folder} is no model of pyargs (its config.json has no 'kind')")
    if config["kind"] not in list(KINDS):
        raise PyargsError(f"{file}: 'kind' is one of {', '.join(KINDS)}, not {config['kind']!r}")
    if kind is not None and config["kind"] != kind:
        raise PyargsError(f"{folder} holds a {config['kind']}, not a {kind}: use pyargs.load_model")
    check_kinds(config, ALWAYS | KINDS[config["kind"]] | {n: k for n, k in ABOUT.items() if n in config}, str(file))
    for stranger in sorted(one.name for one in folder.iterdir() if one.suffix in PICKLED):
        raise PyargsError(
            f"{folder / stranger} is pickled, so that loading it can run code, and no file of a model of pyargs: remove it"
        )
    if not config["lora"] and any((folder / name).exists() for name in lora.FILES):
        raise PyargsError(f"{file} says that there is no LoRA, but an adapter lies beside it: remove one or mend the other")
    return config


def load_backbone(
    folder: Path,
    config: dict,
    *,
    lm=None,
    backbone: nn.Module | str | Path | None = None,
    tokenizer=None,
    dtype=None,
    device=None,
):
    """(language model or None, decoder, tokenizer) of a saved model, with its LoRA adapter.

    lm, backbone: a model in memory, to save loading it twice; LoRA changes a given lm, but not a given backbone. backbone may
    also be the place that it was moved to, which then goes into `config`. dtype: what it is cast to after its weights were
    checked. Raises PyargsError when the weights are not the ones of the training.
    """
    if lm is not None and config["lora"]:
        raise PyargsError("this model has a LoRA adapter, which would change the shared language model: leave it out")
    given = lm.get_decoder() if lm is not None else backbone if isinstance(backbone, nn.Module) else None
    shared = given is not None
    if shared and dtype is not None:
        raise PyargsError("a language model in memory keeps its dtype: leave dtype out, or cast it before")
    if not shared:
        if backbone is not None:
            config["backbone"] = str(backbone)
        check_kinds(config, {"backbone": str, "dtype": str}, f"{folder}/config.json")
        try:
            load = load_classifier if config.get("closed") else load_lm
            lm, tokenizer = load(config["backbone"], dtype=config["dtype"], device=device)
        except PyargsError as error:
            raise PyargsError(
                f"the backbone of {folder}: {error}. If it was moved, say where it is: backbone=PATH of load_model, or "
                "--backbone PATH"
            ) from error
        given = lm.get_decoder()
    if "fingerprint" in config and fingerprint(given) != config["fingerprint"]:
        raise PyargsError(
            f"the weights of '{config.get('backbone')}' are not those that this model was trained on: "
            "load the backbone of the training (same revision, same dtype)"
        )
    if dtype is not None:
        lm.to(torch_dtype(dtype))
    if config["lora"]:
        given = lora.twin(given) if shared else given
        lora.load(given, folder)
    return lm, given, tokenizer


def belongs(folder: Path, config: dict) -> str:
    """What users that are pushed apart belong to: a hash of what all users of the model share. Adding users does not change
    it, nor does pushing."""
    names = ("kind", "fingerprint", "users", "closed", "generic", *KINDS[config["kind"]])
    return short_hash([weights_hash(folder), {name: config.get(name) for name in names}])


def users_folder(folder: Path, config: dict, users: str | Path | None) -> Path:
    """Where the users of a model lie: in its folder, or where `users` says. Their count of trained ones goes into `config`.

    Raises PyargsError for what is no users' table, or that of another model.
    """
    if users is None:
        return folder
    place = locate(users)
    if not (place / TABLE).exists():
        raise PyargsError(f"{users} holds no users' table (no {TABLE}): `pyargs push --users-repo` makes one")
    said = read_json(place / TABLE)
    check_kinds(said, {"of": str, "trained": int}, str(place / TABLE))
    if said["of"] != (own := belongs(folder, config)):
        raise PyargsError(
            f"the users' table {users} belongs to another model ({said['of']}) than {folder} ({own}): give the table that was "
            "pushed with this model"
        )
    config["trained"] = said["trained"]
    return place


def load_users(folder: Path, config: dict, users: str | Path | None = None) -> Users:
    own, folder = folder, users_folder(folder, config, users)
    users = Users.load(folder)
    if (found := _shapes(users)) != config["users"]:
        raise PyargsError(f"{folder}/users.safetensors does not fit: it holds {found}, the model needs {config['users']}")
    if (own / START).exists():
        users.start = read_tensors(own / START)
        if {name: list(value.shape) for name, value in users.start.items()} != {
            n: [1, *s] for n, s in config["users"].items()
        }:
            raise PyargsError(f"{own / START} does not fit: it holds no row of {config['users']}")
    # Folders saved before `trained` was there name the adapted users, who stand behind the others, or count all as trained.
    adapted = [users.ids[user] for user in {*config.get("adapted", ())} if user in users.ids]
    users.trained = config.get("trained", len(users) - len(adapted))
    if not 0 <= users.trained <= len(users) or ("trained" not in config and min(adapted, default=len(users)) < users.trained):
        raise PyargsError(f"{folder}/config.json does not say which of the {len(users)} users were trained: train it again")
    return users


def load_shared(folder: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that all users share. Raises PyargsError unless names and shapes are those of `expected`."""
    shared = read_tensors(folder / "shared.safetensors")
    lora.same_tensors(expected, shared, folder / "shared.safetensors")
    return shared


def about(config: dict, *used: str) -> dict:
    """`about` of the model: a config without the fields of ALWAYS and those that `used` names."""
    described = ("pyargs", "kind", "lora", "users", "trained", "adapted")
    return {name: value for name, value in config.items() if name not in (*described, *used)}


def device_or_default(device) -> torch.device:
    return torch.device(device) if device is not None else default_device()


def _shapes(users: Users) -> dict[str, list[int]]:
    return {name: list(value.shape[1:]) for name, value in users.vectors.items()}
