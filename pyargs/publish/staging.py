"""A saved model as a folder that can be pushed as it is: nothing of its owner's machine, of its users what was asked for."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterator, Sequence, Set
from contextlib import ExitStack
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from pyargs import tuned
from pyargs.errors import PyargsError
from pyargs.files import TUNED, read_json, read_tensors, unchanged, weights_hash, write_json, write_text, writing
from pyargs.lm import lora
from pyargs.lm.hub import is_public
from pyargs.models.folder import ABOUT, ALWAYS, KINDS, TABLE, belongs, load_users, read_config
from pyargs.publish import card
from pyargs.training import hooks
from pyargs.types import START, Users

USERS = ("none", "hashed", "named")
TEXTS, CARD, WEIGHTS = "demonstrations.json", "README.md", "shared.safetensors"
FILES = (CARD, "config.json", WEIGHTS, "users.safetensors", "users.json", START, TEXTS, TABLE, TUNED, *lora.FILES)
"""All that is ever pushed."""
FEWEST = 10
"""Trained users whose mean may be pushed without them: that of fewer tells much of each."""
SALT = 16  # bytes, at least: a shorter one can be searched together with the ids
LOCAL = re.compile(r"/|~|\.{1,2}[/\\]|\\|[A-Za-z]:[\\/]|file:")


def hashed_id(user: str, salt: bytes) -> str:
    """What stands for a user in a model that was pushed with users="hashed": HMAC-SHA256 of the id, in hexadecimal."""
    return hmac.new(salt, user.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def stage(
    folder: str | Path,
    out: str | Path,
    *,
    data: str,
    data_licence: str,
    users: str = "none",
    salt: bytes | None = None,
    users_out: str | Path | None = None,
    results: Sequence[str | Path] = (),
    base_model: str | None = None,
    repo: str = "REPO",
    users_repo: str | None = None,
) -> dict:
    """Writes the saved model of `folder`, of any kind, to `out`, as it may be pushed; `load_model(out)` loads it.

    data, data_licence: what it was trained on, and the licence of that, in words for the card.
    users: "none" leaves them out, the table has the same shapes and no rows; "hashed" gives them the names of `hashed_id`, in
    the order of these; "named" keeps their ids, and demonstrations, which are their texts. salt: of the hashes, 32 random
    bytes by default. users_out: a folder for the users, who are then left out of `out`.
    results: files of `pyargs evaluate` for this very folder, whose means and intervals go to the card.
    base_model: the public name of the backbone, where the model knows it by a local folder. repo, users_repo: the names on the
    hub that the card tells how to load.
    Returns {"files", "users" (how many were kept), "salt" (hexadecimal, or None), "left_out" (files and settings of the folder
    that are not pushed)}. Raises PyargsError where a setting names a place on this machine or a user that was to be left out,
    and for results of another model; then nothing is written.
    """
    folder, keep = Path(folder), users
    if not folder.is_dir():
        raise PyargsError(f"{folder} is no folder: save the model first (save_pretrained, `pyargs train`)")
    with unchanged(folder):
        config = read_config(folder)
        table, texts = load_users(folder, config), None
        if config.get("demonstrations") is not None:
            texts = read_json(folder / TEXTS)
        known = list(table.ids.ids if texts is None else texts)
        salt = _checked(keep, salt, known, texts is not None, users_out)
        made = _renamed(table, keep, salt)
        left = _renamed(table, "none", None) if users_out is not None else made
        base = _public_base(folder, config, base_model)
        own, gone = _public_config(folder, config, base, hide=known if keep != "named" else [])
        for name, words in (("data", data), ("data_licence", data_licence)):
            if not words.strip() or _local(words):
                raise PyargsError(f"{name} is {words!r}, which says nothing to others: give the name that they know")
        measured = card.measured(results, folder)
        with ExitStack() as stack:
            new = stack.enter_context(writing(out, FILES))
            new.mkdir()
            save_file(read_tensors(folder / WEIGHTS), new / WEIGHTS)
            if config["lora"]:
                save_file(read_tensors(folder / lora.FILES[1]), new / lora.FILES[1])
                adapter = {**read_json(folder / lora.FILES[0]), "base_model_name_or_path": base}
                _check(adapter, folder / lora.FILES[0], allowed={base})
                write_json(new / lora.FILES[0], adapter)
            at_mean = own["fields"].get("adapt_init") == "mean" and not len(left)
            if at_mean:
                left.start = table.start or _mean(table)
            if at_mean and not left.start:
                gone.append("the mean of the trained users, at which new ones begin: they are too few")
            if texts is not None:
                write_json(new / TEXTS, texts if keep == "named" and users_out is None else {})
            left.save(new)
            write_json(new / "config.json", {**own, "trained": left.trained})
            if noted := _public_tuned(folder, weights_hash(new)):
                write_json(new / TUNED, noted)
            stuck = at_mean and not left.start and users_out is None
            about = {
                **{"stuck": stuck, "config": own, "data": data, "data_licence": data_licence, "measured": measured},
                **{"repo": repo, "users_repo": users_repo, "apart": users_out is not None, "mean": bool(left.start)},
                **{
                    "users": keep,
                    "kept": 0 if keep == "none" else len(known),
                    "personal": table.personal or texts is not None,
                },
            }
            write_text(new / CARD, card.model_card(**about))
            if users_out is not None:
                apart = stack.enter_context(writing(users_out, FILES))
                made.save(apart)
                if texts is not None:
                    write_json(apart / TEXTS, texts)
                write_json(apart / TABLE, {"of": belongs(new, own), "trained": made.trained})
                write_text(apart / CARD, card.users_card(**about))
            written = sorted(one.name for one in new.iterdir())
    gone += sorted(one.name for one in folder.iterdir() if one.name not in written)
    return {"files": written, "users": about["kept"], "salt": salt.hex() if salt else None, "left_out": gone}


def _checked(keep: str, salt: bytes | None, known: list[str], texts: bool, users_out) -> bytes | None:
    """The salt, where ids are hashed. Raises PyargsError for wishes that do not go together."""
    if keep not in USERS:
        raise PyargsError(f"users is one of {', '.join(USERS)}, not {keep!r}")
    if keep == "none" and users_out is not None:
        raise PyargsError("users are pushed apart, and left out: say how, hashed or named")
    if keep != "none" and not known:
        raise PyargsError(f"this model knows no users who could be {keep}: leave users out")
    if keep == "hashed" and texts:
        raise PyargsError(
            "the users of this model are their texts (demonstrations), which no hash of an id hides: say none, or named"
        )
    if keep != "hashed" and salt is not None:
        raise PyargsError("a salt is for hashed users")
    if salt is not None and (not isinstance(salt, bytes) or len(salt) < SALT):
        raise PyargsError(
            f"the salt is at least {SALT} random bytes, such as secrets.token_bytes(32): leave it out to get one"
        )
    return (salt or secrets.token_bytes(32)) if keep == "hashed" else None


def _rows(table: Users):
    return table.vectors.items()


def _mean(table: Users) -> dict[str, Tensor]:
    """As of `models.trained_mean`; empty where the trained users are few."""
    if table.trained < FEWEST:
        return {}
    return {name: rows.detach()[: table.trained].mean(0, keepdim=True) for name, rows in _rows(table)}


def _renamed(table: Users, keep: str, salt: bytes | None) -> Users:
    """The users as they are pushed; hashed ones in the order of their hashes, trained ones before the others."""
    if keep == "none":
        return Users(**{name: value.detach()[:0] for name, value in _rows(table)})
    names, order = table.ids.ids, list(range(len(table)))
    if salt is not None:
        names = [hashed_id(user, salt) for user in names]
        order.sort(key=lambda row: (row >= table.trained, names[row]))
    made = Users([names[row] for row in order], **{name: value.detach()[order] for name, value in _rows(table)})
    made.trained = table.trained
    return made


def _public_base(folder: Path, config: dict, given: str | None) -> str:
    name = given if given is not None else config.get("backbone")
    if not isinstance(name, str) or not is_public(name, here=given is None):
        raise PyargsError(
            f"{folder}: others do not have the backbone {name!r}. Say under which name they do: base_model=NAME, --base-model "
            "NAME, embedded or on the hub"
        )
    return name


def _public_config(folder: Path, config: dict, base: str, hide: list[str]) -> tuple[dict, list[str]]:
    """config.json as it is pushed, and the names of fields that are left out: those that no loader knows, and ids."""
    known = {"pyargs", "generic", *ALWAYS, *ABOUT, *KINDS[config["kind"]]} - {"adapted"}
    own = {name: value for name, value in config.items() if name in known} | {"backbone": base}
    own["fields"] = dict(config.get("fields", {}))
    if "backbone" in own["fields"]:
        own["fields"]["backbone"] = base
    if str(own.get("method", "")).endswith(".py"):
        own["method"] = Path(own["method"]).name
    _check(own, folder / "config.json", hide, {base, *_words(own.get("method"))})
    return own, [f"config.json: {name}" for name in config if name not in known]


def _words(method) -> set[str]:
    """Words that a method's options may have, whoever the users are."""
    if method not in hooks.names():
        return set()
    declared = dataclasses.fields(hooks.method(method).Config)
    return {word for one in declared for word in (one.metadata.get("choices") or [one.default]) if isinstance(word, str)}


def _public_tuned(folder: Path, weights: str) -> dict:
    """What `pyargs tune` found for policies that others have, too."""
    public = lambda key: is_public(key.rpartition(" ")[0])  # noqa: E731
    found = {key: one for key, one in tuned.every(folder).items() if public(key) and one.get("model") == weights}
    _check(found, folder / TUNED)
    return found


def _check(value, file: Path, hide: Sequence[str] = (), allowed: Set[str] = frozenset()) -> None:
    """Raises PyargsError for a text in a JSON value that is a place on this machine, or names one of the users to hide."""
    hidden = set(hide)
    for place, text in _texts(value):
        if text in allowed:
            continue
        if _local(text):
            raise PyargsError(f"{file}: {place} is {text!r}, a place on this machine: write what others call it")
        if place.startswith(("fields", "demonstrations")):  # the rest is no free text
            if text in hidden or any(len(user) >= 6 and user in text for user in hidden):
                raise PyargsError(f"{file}: {place} is {text!r}, which names a user: take it out, or push with users named")


def _texts(value, place: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for name, one in value.items():
            yield place or "a name", name
            yield from _texts(one, f"{place}.{name}".strip("."))
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one, place)


def _local(text: str) -> bool:
    """Whether a text is, or holds, a path of this machine."""
    own = [str(place) for place in (Path.home(), Path.cwd()) if len(place.parts) > 1]
    return bool(LOCAL.match(text)) or any(place in text for place in own) or ("/" in text and os.path.exists(text))
