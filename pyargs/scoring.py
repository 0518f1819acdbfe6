"""Hidden states and log-probs of given responses, by the CPU stack or by transformers; those of data sets are cached."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from os.path import commonprefix
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor, nn

from pyargs.errors import ELSEWHERE, PyargsError, explained
from pyargs.files import cache_dir, read_tensors, writing
from pyargs.lm import lora
from pyargs.lm.bits import check_plain, held
from pyargs.lm.called import Called
from pyargs.lm.forward import Sequences, batches, packed_states, plain_output_layer, spans, token_logprobs
from pyargs.lm.loading import fingerprint
from pyargs.lm.stack import keep, run
from pyargs.lm.structure import as_written, contents, may_replace, structure, unwrapped
from pyargs.lm.tokenize import encode_closed, encode_prompt, encode_response, shorten
from pyargs.ops import topk_logprobs
from pyargs.ops.library import has_extension
from pyargs.progress import progress_bar
from pyargs.types import Features


def encode_pairs(
    tokenizer, dataset, max_length: int | None, *, stop=False, separate_prompt=False, closed=False, pad=None, render=None
):
    """The dataset's pairs as (prompt ids, [response ids]) with every distinct prompt and response once.

    stop: responses end with the tokenizer's end token, for models that learn to stop. separate_prompt: the prompt is no prefix
    but the first of the responses, each of which then sees only itself. closed: whole conversations (`encode_closed`) up to
    their last token that is not `pad`; what those of a prompt begin with alike is their group's prompt. render(prompt, user,
    max_tokens): prompt ids that depend on the user (demonstrations); without it `encode_prompt`.
    Returns groups and, for each pair, the numbers (group, chosen, rejected) of its responses within the group.
    """
    if closed:
        return _closed_pairs(tokenizer, dataset, max_length, pad)
    texts: dict[str, list[int]] = {}
    full: dict[tuple, list[int]] = {}
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
        if key not in full:
            full[key] = prompt_ids(row)
        # A prompt that must be cut is cut for its own pair, so that no other row changes what this one looks like.
        room = None if max_length is None else max_length - max(len(texts[text]) for text in sides)
        if room is not None and len(full[key]) <= room:
            room = None
        if (key, room) not in numbers:
            numbers[key, room] = len(encoded)
            encoded.append((full[key] if room is None else prompt_ids(row, room), []))
            places.append({})
        group = numbers[key, room]
        for text in sides:
            if text not in places[group]:
                places[group][text] = len(encoded[group][1])
                encoded[group][1].append(texts[text])
        pairs.append((group, *(places[group][text] for text in sides)))
    if separate_prompt:
        return [([], [prompt, *several]) for prompt, several in encoded], [(g, c + 1, r + 1) for g, c, r in pairs]
    return encoded, pairs


def _closed_pairs(tokenizer, dataset, max_length: int | None, pad: int | None):
    groups: dict[str, dict[tuple[int, ...], int]] = {}  # by the prompt as it is read: its conversations and their numbers
    pairs = []
    for row in dataset:
        messages, alone = shorten(tokenizer, row["prompt"])
        sides = [encode_closed(tokenizer, messages, row[side]) for side in ("chosen", "rejected")]
        if max_length is not None and (longest := max(map(len, sides))) > max_length:
            messages, _ = shorten(tokenizer, row["prompt"], max_length - longest + len(alone))
            sides = [encode_closed(tokenizer, messages, row[side]) for side in ("chosen", "rejected")]
        key = json.dumps(messages)
        several = groups.setdefault(key, {})
        pairs.append((key, *(several.setdefault(tuple(before_pad(ids, pad)), len(several)) for ids in sides)))
    number = {key: place for place, key in enumerate(groups)}
    encoded = []
    for several in groups.values():
        shared = commonprefix([ids[:-1] for ids in several])
        encoded.append((list(shared), [list(ids[len(shared) :]) for ids in several]))
    return encoded, [(number[key], *sides) for key, *sides in pairs]


def before_pad(ids: Sequence[int], pad: int | None) -> Sequence[int]:
    """A text up to its last token that is not `pad`, where transformers' classifiers read their score. Raises PyargsError for
    a text of padding alone."""
    end = len(ids)
    while pad is not None and end and ids[end - 1] == pad:
        end -= 1
    if not end:
        raise PyargsError("a conversation has no token but padding: there is nothing to score")
    return ids[:end]


def features(decoder, tokenizer, dataset, *, max_length: int | None = 512, last=False, cache=True, **form) -> Features:
    """Hidden states of all responses of a dataset under a frozen backbone.

    They are kept in the user's cache under a hash of the weights and of the token ids, so the same pairs are computed
    once. last: only the last token of each response; form (separate_prompt; closed, pad): as for `encode_pairs`. Nothing is
    cached for a backbone with LoRA, which belongs to one experiment.
    """
    if not len(dataset):
        raise PyargsError("no pairs to compute features of: the split is empty")
    encoded, pairs = encode_pairs(tokenizer, dataset, max_length, **form)

    def compute() -> dict[str, Tensor]:
        states = [state[-1:] if last else state for several in response_states(decoder, encoded) for state in several]
        return {"hidden": torch.cat(states), "offsets": torch.tensor([0, *map(len, states)], device="cpu").cumsum(0)}

    stored = _cached("features", decoder, [encoded, last], compute) if cache else compute()
    first, chosen, rejected = _numbered(encoded, pairs)
    prompt = torch.tensor([first[group] for group, *_ in pairs], device="cpu") if form.get("separate_prompt") else None
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
    """Per-token log-probs [T] of every response of `encode_pairs`, one after the other; cached like features."""

    def compute() -> dict[str, Tensor]:
        values = [value for several in response_logprobs(policy, encoded) for value in several]
        return {"logprobs": torch.cat(values), "lengths": torch.tensor([len(value) for value in values], device="cpu")}

    stored = _cached("logprobs", policy, encoded, compute)
    return list(stored["logprobs"].split(stored["lengths"].tolist()))


def rounding() -> list[str]:
    """What decides the last digits besides the model: builds of torch and the extension, and their CPU code paths."""
    found = [torch.__version__, torch.backends.cpu.get_cpu_capability()]
    if has_extension:
        from pyargs import _C

        found += [_C.cpu_capability(), _digest(_C.__file__)]
    return found


@functools.cache
def _digest(file: str) -> str:
    return hashlib.blake2b(Path(file).read_bytes(), digest_size=16).hexdigest()


_cache: ContextVar[bool] = ContextVar("_cache", default=True)


@contextmanager
def uncached():
    """Within, nothing is read from the user's cache or kept there: for texts that are to be forgotten."""
    token = _cache.set(False)
    try:
        yield
    finally:
        _cache.reset(token)


def _cached(kind: str, model, inputs, compute) -> dict[str, Tensor]:
    """compute(), or its earlier result for the same model and inputs. Not cached with LoRA, which belongs to one experiment,
    nor with hooks or a function, which may do anything, nor within `uncached`."""
    if isinstance(model, Called) or lora.present(model) or not as_written(model) or not _cache.get():
        return compute()
    # Weights alone do not make a model, and every product is rounded in its own way.
    made = [repr(sorted(structure(model).items())), *(value.hex() for value in contents(model.buffers()))]
    few = held(model)
    key = json.dumps([fingerprint(model), made, inputs, keep.can_pack(model), few and few.dtype, rounding()])
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


@torch.no_grad()
def response_states(decoder: nn.Module, groups: Sequences, *, max_tokens: int = 4096, progress: str = "features"):
    """Hidden states of every response: for each group a list of float32 tensors [T, D], one for each of its responses."""
    decoder = unwrapped(decoder)
    if isinstance(decoder, Called):
        return [[decoder.states(prompt, response) for response in several] for prompt, several in groups]
    if not may_replace(decoder):
        return list(_one_by_one(decoder, groups, progress, _of_states))
    if keep.can_pack(decoder):
        return [states for _, states in run.continuations(keep.stack_as_held(decoder), groups, progress)]
    device = next(decoder.parameters()).device
    found: list[list[Tensor]] = [[torch.empty(0, dtype=torch.float32, device="cpu")] * len(several) for _, several in groups]
    for numbers, packed in batches(groups, decoder, max_tokens, progress):
        states, mask = spans(packed_states(decoder, packed.to(device)), packed.to(device))
        for (group, response), state, seen in zip(numbers, states, mask, strict=True):
            found[group][response] = state[seen].float().cpu()
    return found


def _one_by_one(model: nn.Module, groups: Sequences, progress: str, read) -> Iterator[list[Tensor]]:
    """Each response behind its prompt in a pass of its own, the slow way; read(output, ids [1, T], length of the prompt)."""
    check_plain(model)
    device = next(model.parameters()).device
    for prompt, several in progress_bar(groups, desc=progress, unit="prompt", hide=len(groups) < 32):
        rows = [torch.tensor([[*prompt, *response]], dtype=torch.long, device=device) for response in several]
        yield [read(model(input_ids=ids, use_cache=False), ids, len(prompt)).cpu() for ids in rows]


@torch.no_grad()
def response_logprobs(model: nn.Module, groups: Sequences, *, max_tokens: int = 4096, progress: str = "policy"):
    """log pi(y_t | x, y_<t) of every response: for each group a list of float32 tensors [T]."""
    model = unwrapped(model)
    if not all(prompt for prompt, _ in groups):
        raise PyargsError("a response without a prompt has no first log-prob: give each at least one token before it")
    if not (may_replace(model) and plain_output_layer(model)):
        return list(_one_by_one(model, groups, progress, _of_logits))
    if keep.can_pack(model):
        return _stack_logprobs(keep.stack_of(model), groups, progress)
    device = next(model.get_decoder().parameters()).device
    found: list[list[Tensor]] = [[torch.empty(0, dtype=torch.float32, device="cpu")] * len(several) for _, several in groups]
    for numbers, packed in batches(groups, model.get_decoder(), max_tokens, progress):
        scores, mask = token_logprobs(model, packed.to(device))
        for (group, response), score, seen in zip(numbers, scores.cpu(), mask.cpu(), strict=True):
            found[group][response] = score[seen]
    return found


def _of_states(output, ids: Tensor, start: int) -> Tensor:
    """States [T, D] of the tokens of ids [1, S] from `start` on."""
    return output.last_hidden_state[0, start:].float()


def _of_logits(output, ids: Tensor, start: int) -> Tensor:
    """Log-probs [T] of the tokens of ids [1, S] from `start` on."""
    return output.logits[0, start - 1 : -1].float().log_softmax(-1).gather(-1, ids[0, start:, None]).squeeze(-1)


POSITIONS = 12
"""Whose logits are kept at a time: rows of one block of the output layer's product (kBlockRows of csrc/stack/gemm.h)."""


def _stack_logprobs(stack: run.Stack, groups: Sequences, progress: str) -> list[list[Tensor]]:
    found = []
    for (_, several), (last, states) in zip(groups, run.continuations(stack, groups, progress), strict=True):
        predicting = torch.cat([row for state in states for row in (last[: len(state)], state[:-1])] or [last[:0]])
        ids = torch.tensor([token for response in several for token in response], dtype=torch.long).unsqueeze(1)
        parts = zip(predicting.split(POSITIONS), ids.split(POSITIONS), strict=True)
        values = [_logprobs(stack.logits(rows), part) for rows, part in parts]
        found.append(list(torch.cat(values).split([len(response) for response in several])))
    return found


def _logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Of ids [T, 1], float32 [T]. The op's sum, unlike torch's, is the same for a row whatever the others are."""
    return logits.gather(1, ids).squeeze(1) - topk_logprobs(logits, 1)[2]
