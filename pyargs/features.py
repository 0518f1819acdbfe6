"""From text to tensors: hidden states and log-probs of a data set's responses, each computed once and kept in the cache."""

from __future__ import annotations

import hashlib
import json

import torch
from safetensors.torch import save_file
from torch import Tensor

from pyargs.errors import PyargsError
from pyargs.files import read_tensors, writing
from pyargs.lm.encode import encode_prompt, encode_response
from pyargs.lm.hf import fingerprint, response_logprobs, response_states
from pyargs.lm.hub import cache_dir
from pyargs.types import Features


def groups(tokenizer, dataset, max_length: int | None):
    """The dataset's pairs as (prompt ids, [response ids]) with every distinct prompt and response once.

    Returns groups and, for each pair, the numbers (group, chosen, rejected) of its responses within the group.
    """
    texts: dict[str, list[int]] = {}
    whole: dict[str, list[int]] = {}
    numbers: dict[tuple, int] = {}
    encoded: list[tuple[list[int], list[list[int]]]] = []
    places: list[dict[str, int]] = []
    pairs = []
    for row in dataset:
        key = row["prompt"] if isinstance(row["prompt"], str) else json.dumps(row["prompt"])
        sides = (row["chosen"], row["rejected"])
        for text in sides:
            if text not in texts:
                texts[text] = encode_response(tokenizer, text)
        if key not in whole:
            whole[key] = encode_prompt(tokenizer, row["prompt"])
        # A prompt that must be cut is cut for its own pair, so that no other row changes what this one looks like.
        room = None if max_length is None else max_length - max(len(texts[text]) for text in sides)
        if room is not None and len(whole[key]) <= room:
            room = None
        if (key, room) not in numbers:
            numbers[key, room] = len(encoded)
            encoded.append((whole[key] if room is None else encode_prompt(tokenizer, row["prompt"], room), []))
            places.append({})
        group = numbers[key, room]
        for text in sides:
            if text not in places[group]:
                places[group][text] = len(encoded[group][1])
                encoded[group][1].append(texts[text])
        pairs.append((group, *(places[group][text] for text in sides)))
    return encoded, pairs


def features(decoder, tokenizer, dataset, *, max_length: int | None = 512, last: bool = False, cache: bool = True) -> Features:
    """Hidden states of all responses of a dataset under a frozen backbone.

    They are kept in the user's cache under a hash of the weights and of the token ids, so the same pairs are computed
    once. last: only the last token of each response. A backbone with LoRA is never cached: its weights are one experiment's.
    """
    if not len(dataset):
        raise PyargsError("no pairs to compute features of: the split is empty")
    encoded, pairs = groups(tokenizer, dataset, max_length)

    def compute() -> dict[str, Tensor]:
        states = [state[-1:] if last else state for several in response_states(decoder, encoded) for state in several]
        return {"hidden": torch.cat(states), "offsets": torch.tensor([0, *map(len, states)]).cumsum(0)}

    stored = _cached("features", decoder, [encoded, last], compute) if cache else compute()
    first = torch.tensor([0, *(len(several) for _, several in encoded)]).cumsum(0).tolist()
    chosen, rejected = (torch.tensor([first[group] + pair[side] for group, *pair in pairs]) for side in (0, 1))
    return Features(stored["hidden"], stored["offsets"], chosen, rejected, list(dataset["user_id"]))


def policy_logprobs(policy, encoded) -> list[Tensor]:
    """Per-token log-probs [T] of every response of `groups`, one after the other; cached like features."""

    def compute() -> dict[str, Tensor]:
        values = [value for several in response_logprobs(policy, encoded) for value in several]
        return {"logprobs": torch.cat(values), "lengths": torch.tensor([len(value) for value in values])}

    stored = _cached("logprobs", policy, encoded, compute)
    return list(stored["logprobs"].split(stored["lengths"].tolist()))


def _cached(kind: str, model, inputs, compute) -> dict[str, Tensor]:
    """compute(), or what it gave before for the same weights and inputs. A model with LoRA is one experiment's: not kept."""
    if hasattr(model, "peft_config"):
        return compute()
    key = hashlib.blake2b(json.dumps([fingerprint(model), inputs]).encode(), digest_size=16).hexdigest()
    file = cache_dir() / kind / f"{key}.safetensors"
    if file.exists():
        return read_tensors(file)
    values = compute()
    with writing(file) as temporary:
        save_file(values, temporary)
    return values
