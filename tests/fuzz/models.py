"""Entry points that load a model: folders of trained models, language models, GGUF files, as they are and as blocks."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from random import Random
from unittest import mock

import torch
from folders import make, same
from fuzz.guard import Violation
from fuzz.mutations import mend, some_bytes, spoil
from fuzz.reading import bits, must, tiny_gguf

import pyargs
from pyargs.data.synthetic import tiny_lm
from pyargs.errors import PyargsError
from pyargs.lm.loading import load_lm
from pyargs.metrics.rm_accuracy import compare

TEXT = [([3, 4, 5], [[6, 7], [8]])]


def of_kind(kind: str):
    def prepare(own: Path, outside: Path):
        return folder_of(kind, own, outside)

    prepare.__doc__ = f"The folder of a {type_of(kind)}."
    return prepare


def type_of(kind: str) -> str:
    return {"reward": "reward model", "token": "token reward"}.get(kind, f"user policy ({kind})")


def folder_of(kind: str, own: Path, outside: Path):
    backbone = str(tiny_lm(own / "lm", layers=1, width=32, heads=2))
    folder, again, loaded = own / "model", own / "again", load_lm(backbone)
    model = make(kind, backbone)
    model.save_pretrained(folder)
    whole, fingerprint = {file.name: file.read_bytes() for file in folder.iterdir()}, model.about["fingerprint"]

    def backbone_of(name, *, dtype, device=None):
        """Read from the disk once. What another name of a backbone may name is for the attempts on backbones."""
        if (name, dtype) != (backbone, "float32"):
            raise PyargsError(f"there is no backbone '{name}' as {dtype}")
        return copy.deepcopy(loaded[0]), loaded[1]

    def attempt(random: Random, said: list) -> None:
        mend(folder, whole)
        said.append(spoil(random, folder, whole, (str(outside), 10**400, [1, 2, 32]), lambda name: name != "README.md"))
        with mock.patch.multiple("pyargs.models.folder", load_lm=backbone_of, fingerprint=lambda lm: fingerprint):
            found = pyargs.load_model(folder)
            answers = answered(kind, found)
            shutil.rmtree(again, ignore_errors=True)
            found.save_pretrained(again)
            other = pyargs.load_model(again)
        must(same_bits(other, found), "saved again it has other numbers")
        must(list(other.known_users) == list(found.known_users), "saved again it has other users")
        must(other.about == found.about, "saved again it says otherwise how it was made")
        must(answered(kind, other) == answers, "saved again it answers otherwise")

    return attempt, (*whole, "model", "backbone", "user", "reward")


def same_bits(one, other) -> bool:
    return same(one, other) or bits(one.state_dict()) == bits(other.state_dict())


@torch.no_grad()
def answered(kind: str, model) -> list:
    """For each of the first users rewards, or log-probs, of a few responses. Raises PyargsError where they are no numbers."""
    users, found = list(model.known_users)[:3] or [""], []
    for user in users:
        if kind == "icl":
            found.append(model.prompt_ids("tell me", user, 64))
            continue
        if kind == "soft":
            from pyargs.lm.tokenize import pack

            packed = pack([TEXT[0][0]], [TEXT[0][1]], share=False)
            values = model.logprobs(packed, model.users.rows([user] * 2) if len(model.users) else torch.full((2,), -1))[0]
        else:
            values = model.score(TEXT, [user])[0]
        compare(values.view(-1), values.view(-1), [user] * values.numel())  # refuses what is no number, as metrics do
        found.append(values.tolist())
    return found


def language_model(own: Path, outside: Path):
    """The folder of a language model, as transformers wrote it."""
    folder = tiny_lm(own / "lm", layers=1, width=32, heads=2)
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    right = logits(load_lm(str(folder))[0])
    shutil.copytree(folder, outside, dirs_exist_ok=True)
    more = (str(outside), f"{outside}/tokenizer.json", f"{outside}/model.safetensors", f"{outside}/trap.py")

    def attempt(random: Random, said: list) -> None:
        mend(folder, whole)
        keys = ("tokenizer_file", "vocab_file", "chat_template", "tokenizer_class", "_name_or_path", "added_tokens_file")
        said.append(spoil(random, folder, whole, (*more, {random.choice(keys): random.choice(more)})))
        lm, tokenizer = load_lm(str(folder))
        with_words(tokenizer)
        must(bool(logits(lm).isfinite().all()), "its logits are no numbers")
        must(logits(lm).shape[:2] == right.shape[:2], "another shape")

    return attempt, (*whole, "lm", "model")


def with_words(tokenizer) -> None:
    from pyargs.lm.tokenize import encode_prompt

    ids = encode_prompt(tokenizer, "tell me")
    must(all(type(one) is int and one >= 0 for one in ids), f"ids {ids}")


@torch.no_grad()
def logits(lm) -> torch.Tensor:
    return lm(torch.tensor([[3, 4, 5, 2]])).logits


def gguf_model(own: Path, outside: Path):
    """A GGUF file as float32."""
    return of_gguf(own, ("float32",))


def gguf_blocks(own: Path, outside: Path):
    """A GGUF file as the blocks of its file, which give the stack's float32 states."""
    return of_gguf(own, ("file", "float32"))


def of_gguf(own: Path, dtypes: tuple[str, ...]):
    from pyargs.lm.stack import keep

    file, valid = tiny_gguf(own)
    whole = {one.name: one.read_bytes() for one in own.iterdir()}

    def attempt(random: Random, said: list) -> None:
        mend(own, whole)
        new = some_bytes(random, valid)
        said.append(
            [(i, new[i : i + 8]) for i in range(0, min(len(new), len(valid)), 8) if new[i : i + 8] != valid[i : i + 8]][:6]
        )
        file.write_bytes(new)
        states = []
        for dtype in dtypes:
            lm = load_lm(str(file), dtype=dtype)[0]
            if len(dtypes) == 1:
                must(logits(lm).ndim == 3, "no logits")
                continue
            stack = keep.stack_of(lm)
            states.append(stack(torch.tensor([[3, 4, 5, 2]]), stack.cache(1, 4)))
        if len(states) == 2 and not torch.allclose(*states, atol=0, rtol=0, equal_nan=True):
            raise Violation(f"blocks give {states[0].flatten()[:4].tolist()}, float32 {states[1].flatten()[:4].tolist()}")

    return attempt, ("model.gguf",)
