"""From text to tensors: hidden states and log-probs of a data set's responses, each computed once and kept in the cache."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor

from pyargs.errors import ELSEWHERE, PyargsError, explained
from pyargs.files import read_tensors, writing
from pyargs.lm import lora
from pyargs.lm.forward import fingerprint, response_logprobs, response_states
from pyargs.lm.hub import cache_dir
from pyargs.lm.stack import run
from pyargs.lm.structure import as_written, contents, structure
from pyargs.lm.tokenize import encode_prompt, encode_response
from pyargs.ops.library import has_extension
from pyargs.types import Features


def groups(tokenizer, dataset, max_length: int | None, *, stop: bool = False, apart: bool = False, render=None):
    """The dataset's pairs as (prompt ids, [response ids]) with every distinct prompt and response once.

    stop: responses end with the tokenizer's end token, for models that learn to stop. apart: the prompt is no prefix but
    stands first among the responses, each of which then sees only itself. render(prompt, user, max_tokens): prompt ids
    that depend on the user (demonstrations); without it `encode_prompt`.
    Returns groups and, for each pair, the numbers (group, chosen, rejected) of its responses within the group.
    """
    texts: dict[str, list[int]] = {}
    whole: dict[tuple, list[int]] = {}
    numbers: dict[tuple, int] = {}
    encoded: list[tuple[list[int], list[list[int]]]] = []
    places: list[dict[str, int]] = []
    pairs = []
    end = [tokenizer.eos_token_id] if stop else []

    def prompt_ids(row: dict, room: int | None = None) -> list[int]:
        return render(row["prompt"], row["user_id"], room) if render else encode_prompt(tokenizer, row["prompt"], room)

    for row in dataset:
        key = (row["prompt"] if isinstance(row["prompt"], str) else json.dumps(row["prompt"]), render and row["user_id"])
        sides = (row["chosen"], row["rejected"])
        for text in sides:
            if text not in texts:
                texts[text] = encode_response(tokenizer, text) + end
        if key not in whole:
            whole[key] = prompt_ids(row)
        # A prompt that must be cut is cut for its own pair, so that no other row changes what this one looks like.
        room = None if max_length is None else max_length - max(len(texts[text]) for text in sides)
        if room is not None and len(whole[key]) <= room:
            room = None
        if (key, room) not in numbers:
            numbers[key, room] = len(encoded)
            encoded.append((whole[key] if room is None else prompt_ids(row, room), []))
            places.append({})
        group = numbers[key, room]
        for text in sides:
            if text not in places[group]:
                places[group][text] = len(encoded[group][1])
                encoded[group][1].append(texts[text])
        pairs.append((group, *(places[group][text] for text in sides)))
    if apart:
        return [([], [prompt, *several]) for prompt, several in encoded], [(g, c + 1, r + 1) for g, c, r in pairs]
    return encoded, pairs


def features(
    decoder, tokenizer, dataset, *, max_length: int | None = 512, last: bool = False, apart: bool = False, cache: bool = True
) -> Features:
    """Hidden states of all responses of a dataset under a frozen backbone.

    They are kept in the user's cache under a hash of the weights and of the token ids, so the same pairs are computed
    once. last: only the last token of each response; apart: as in `groups`. A backbone with LoRA is never cached: its
    weights are one experiment's.
    """
    if not len(dataset):
        raise PyargsError("no pairs to compute features of: the split is empty")
    encoded, pairs = groups(tokenizer, dataset, max_length, apart=apart)

    def compute() -> dict[str, Tensor]:
        states = [state[-1:] if last else state for several in response_states(decoder, encoded) for state in several]
        return {"hidden": torch.cat(states), "offsets": torch.tensor([0, *map(len, states)], device="cpu").cumsum(0)}

    stored = _cached("features", decoder, [encoded, last], compute) if cache else compute()
    first, chosen, rejected = _numbered(encoded, pairs)
    prompt = torch.tensor([first[group] for group, *_ in pairs], device="cpu") if apart else None
    return Features(stored["hidden"], stored["offsets"], chosen, rejected, list(dataset["user_id"]), prompt)


def _numbered(encoded, pairs) -> tuple[list[int], Tensor, Tensor]:
    """Number of each group's first response when all responses are counted, and those of the pairs' responses [N]."""
    first = torch.tensor([0, *(len(several) for _, several in encoded)], device="cpu").cumsum(0).tolist()
    chosen, rejected = (torch.tensor([first[group] + pair[side] for group, *pair in pairs], device="cpu") for side in (0, 1))
    return first, chosen, rejected


def pair_logprobs(policy, encoded, pairs) -> tuple[Tensor, Tensor]:
    """Sums of log pi over the tokens of each pair's responses, float64 [N, 2], and their lengths int64 [N, 2]."""
    values = policy_logprobs(policy, encoded)
    total = torch.tensor([value.double().sum().item() for value in values], dtype=torch.float64, device="cpu")
    length = torch.tensor([len(value) for value in values], device="cpu")
    _, chosen, rejected = _numbered(encoded, pairs)
    response = torch.stack([chosen, rejected], dim=1)
    return total[response], length[response]


def policy_logprobs(policy, encoded) -> list[Tensor]:
    """Per-token log-probs [T] of every response of `groups`, one after the other; cached like features."""

    def compute() -> dict[str, Tensor]:
        values = [value for several in response_logprobs(policy, encoded) for value in several]
        return {"logprobs": torch.cat(values), "lengths": torch.tensor([len(value) for value in values], device="cpu")}

    stored = _cached("logprobs", policy, encoded, compute)
    return list(stored["logprobs"].split(stored["lengths"].tolist()))


def rounding() -> list[str]:
    """What decides the last digits beside the model: torch and the extension as they are built, and their CPU code paths."""
    found = [torch.__version__, torch.backends.cpu.get_cpu_capability()]
    if has_extension:
        from pyargs import _C

        found += [_C.cpu_capability(), _digest(_C.__file__)]
    return found


@functools.cache
def _digest(file: str) -> str:
    return hashlib.blake2b(Path(file).read_bytes(), digest_size=16).hexdigest()


def _cached(kind: str, model, inputs, compute) -> dict[str, Tensor]:
    """compute(), or what it gave before for the same model and inputs. One with LoRA is one experiment's, and one with hooks
    may do anything: not kept."""
    if lora.present(model) or not as_written(model):
        return compute()
    # Weights alone do not make a model, and every product is rounded in its own way.
    made = [repr(sorted(structure(model).items())), *(value.hex() for value in contents(model.buffers()))]
    key = json.dumps([fingerprint(model), made, inputs, run.can_pack(model), rounding()])
    key = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    file = cache_dir() / kind / f"{key}.safetensors"
    if file.exists():
        return read_tensors(file)
    lock = FileLock(file.with_suffix(".lock"))  # of processes that ask for the same, one computes
    with explained(f"the cache {file.parent} cannot be written", ELSEWHERE):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        if file.exists():
            return read_tensors(file)
        values = compute()
        with writing(file) as temporary:
            save_file(values, temporary)
    finally:
        lock.release()
    return values
