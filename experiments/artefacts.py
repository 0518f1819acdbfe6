"""Committed cells as folders for the hub: the answers of each, and its trained model with its users where these lie here."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from experiments import reproduce, results, rules
from experiments.profiles import PROFILES, Cell
from pyargs import files
from pyargs.models.folder import read_config
from pyargs.publish import card
from pyargs.publish.staging import hashed_id, stage

OWNER = "OWNER"
"""Who pushes a folder writes their own name there."""


def build(places: reproduce.Places, out: Path, profile: str | None = None) -> dict:
    """Writes OUT/PROFILE/SET/POLICY/ROW-SEED/{generations, model, users} of the cells that lie at places.results.

    Hashed ids of users and pairs have one salt, which is kept beside `out` in a file that only its owner reads.
    Returns how many folders of each kind there are, their bytes, and by name the cells whose trained model is not here.
    """
    salt, built, missing = salt_beside(out), {"generations": [], "model": [], "users": []}, []
    for cell in results.read(places.results):
        if profile not in (None, cell["profile"]):
            continue
        place = out / Path(results.name(cell)).with_suffix("")
        if cell.get("answers"):
            built["generations"].append(generations(cell, place / "generations", salt))
        if (why := _model(cell, places, place, salt)) is None:
            built["model"].append(place / "model")
            built["users"] += [place / "users"] if (place / "users").exists() else []
        elif why:
            missing.append(why)
    return {
        "out": str(out),
        **{kind: len(some) for kind, some in built.items()},
        "bytes": {kind: sum(map(_bytes, some)) for kind, some in built.items()},
        "largest": max([_bytes(one) for some in built.values() for one in some], default=0),
        "no model here": missing,
    }


def salt_beside(out: Path) -> bytes:
    """OUT.salt, made if it is not there: with it, a later run gives users the same names."""
    file = files.beside(out, "salt")
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(secrets.token_hex(32))
    return bytes.fromhex(file.read_text())


def generations(cell: dict, folder: Path, salt: bytes) -> Path:
    """The answers of a cell, one a line, with a card. Ids stay where the set's may be named."""
    settings, answers = PROFILES[cell["profile"]]["sets"][cell["set"]], cell["answers"]
    hashed = settings["ids"] != "named"
    name = (lambda value: hashed_id(value, salt)) if hashed else str
    older = [rule.before for rule in rules.older(cell)]
    provenance = cell.get("provenance") or {}
    made = {
        "policy": cell["policy"],
        "row of the paper": cell["row"],
        "method": cell.get("method") or "none",
        "seed": cell["seed"],
        "raw weight": cell["values"].get("reward_weight", "none"),
        "settings": " ".join(settings["decode"] or []) or "defaults",
        "commit of pyargs": provenance.get("commit") or "not noted",
        **({"made before a rule changed": "; ".join(older)} if older else {}),
    }
    with files.writing(folder, ("README.md", "generations.jsonl")) as new:
        new.mkdir()
        rows = ({**one, "user_id": name(one["user_id"]), "pair_id": name(one["pair_id"])} for one in answers)
        files.write_jsonl(new / "generations.jsonl", rows)
        about = {
            "title": f"Answers of {cell['row']} ({cell['set']}, {cell['policy']}, seed {cell['seed']})",
            "data": cell["data"],
            "data_licence": settings["licence"],
            "method": cell.get("method"),
            "made": made,
            "hashed": hashed,
            "count": len(answers),
            "left_out": sum(one["text"] is None for one in answers),
            "rows": list(card.measures({"generations": cell["values"].get("generations") or {}, "answers": answers})),
        }
        files.write_text(new / "README.md", card.generations_card(**about))
    return folder


def _model(cell: dict, places: reproduce.Places, place: Path, salt: bytes) -> str | None:
    """Stages the trained model of a cell; why that could not be, empty for a cell without a model of its own."""
    one, settings = Cell(*(cell[name] for name in Cell._fields)), PROFILES[cell["profile"]]["sets"][cell["set"]]
    if cell["row"] in reproduce.NO_POLICY or cell["row"] == "ARGS, weight 0":
        return ""
    if cell["row"] not in settings["rows"]:
        return f"{one.name()}: no row of this profile any more"
    source, result = reproduce.model_folder(one, places) / "model", reproduce.out_folder(one, places) / "result.json"
    if not source.is_dir() or not result.exists():
        return f"{one.name()}: {results.command(one.profile, [one.row], [one.set])} --seeds {one.seed}"
    found = files.read_json(result)["values"]
    if {**found, "answers": 0, "relative": 0} != {**cell["values"], "answers": 0, "relative": 0}:
        return f"{one.name()}: the model at {source} is another run's, whose numbers differ"
    shown = read_config(source).get("demonstrations") is not None  # texts of the data, which are never released
    users = settings["ids"] if files.read_json(source / "users.json") and not shown else "none"
    repo = f"{OWNER}/{'-'.join(map(results.slug, (one.set, one.policy, one.row)))}-{one.seed}"
    stage(
        source,
        place / "model",
        data=cell["data"],
        data_licence=settings["licence"],
        users=users,
        salt=salt if users == "hashed" else None,
        users_out=None if users == "none" else place / "users",
        results=[result],
        repo=repo,
        users_repo=None if users == "none" else f"{repo}-users",
    )
    return None


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
