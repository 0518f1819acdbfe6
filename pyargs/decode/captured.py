"""ARGS on a GPU: the whole step as one CUDA graph, replayed without a word from the host.

A graph has fixed shapes and addresses. So the rows and the caches' places are rounded up (a batch of 5 runs as one of 8, the
rows too many finished from the start), lengths and counters are tensors on the device, and what a step hands to the next is
copied back to where it came from. NOT YET RUN ON A GPU: the tests run the same steps uncaptured.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from pyargs.decode import passes
from pyargs.decode.passes import OnePass, TwoPasses
from pyargs.decode.request import Output, Request
from pyargs.decode.step import State, begin, choose
from pyargs.lm import lora
from pyargs.lm.cache import PrefixCache
from pyargs.lm.launches import few_launches
from pyargs.models.reward_model import RewardModel
from pyargs.types import Decoded

PLACES = 256
"""The caches' capacity is a multiple of it."""
KEPT = 4
"""Recordings of one reward model; each holds caches and a graph, and the oldest makes room."""


@dataclass
class Recording:
    """The buffers that a captured step reads and writes, and `replay`, which runs it on them."""

    request: Request
    output: Output
    state: State
    caches: tuple[PrefixCache, ...]
    replay: Callable[[], object]


_recordings: weakref.WeakKeyDictionary[RewardModel, dict[tuple, Recording]] = weakref.WeakKeyDictionary()
_refused: weakref.WeakKeyDictionary[RewardModel, bool] = weakref.WeakKeyDictionary()


def possible(policy, reward_model: RewardModel) -> bool:
    """Whether a captured step is worth trying: both models on one GPU, and no attempt of this reward model's has failed."""
    devices = {policy.device, reward_model.device, reward_model.backbone.device}
    return len(devices) == 1 and devices.pop().type == "cuda" and reward_model not in _refused


@torch.no_grad()
def decode(policy, reward_model: RewardModel, request: Request) -> Decoded | None:
    """As `pyargs.decode.args.decode`, through a captured step; None, with a warning, where these models allow none."""
    rows, length = request.input_ids.shape
    k, device = request.num_candidates, request.user.device
    rows, places = 1 << (rows - 1).bit_length(), -(-(length + request.max_new_tokens + k) // PLACES) * PLACES
    way = passes.of(policy, reward_model, rows, k)
    wide = _widened(request, rows, places)
    finished = torch.arange(rows, device=device) >= len(request.user)
    kept = _recordings.setdefault(reward_model, {})
    key = _key(policy, reward_model, way, wide, places)

    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if key in kept:
            recording = kept[key]
            _start(way(policy, reward_model, recording.caches), reward_model, wide, finished, recording)
        else:
            caches = way.caches(policy, reward_model, rows, places)
            both = way(policy, reward_model, caches)
            state = State(*(tensor.clone() for tensor in begin(both, reward_model, wide, finished)))
            recording = Recording(wide, Output(rows, places, device), state, caches, lambda: None)
            _start(both, reward_model, wide, finished, recording)
            try:
                with few_launches(policy.get_decoder(), reward_model.backbone):
                    recording.replay = _capture(partial(_step, both, reward_model.head.fold(), recording), device)
            except RuntimeError as error:  # what CUDA says of a call that a capture forbids, such as a read by the host
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                _refused[reward_model] = True
                warnings.warn(
                    f"a decoding step of {type(policy).__name__} and {type(reward_model.backbone).__name__} cannot be "
                    f"captured as a CUDA graph: each is launched kernel by kernel, which is slower ({error})",
                    stacklevel=4,
                )
                return None
            while len(kept) >= KEPT:
                del kept[next(iter(kept))]
            kept[key] = recording
            _start(both, reward_model, wide, finished, recording)  # a capture's trial steps have gone ahead
        for step in range(request.max_new_tokens):
            recording.replay()
            if recording.output.stop(request, step, recording.state.finished):
                break
        return recording.output.decoded(request, recording.state.finished)


def _start(both: TwoPasses | OnePass, reward_model, request: Request, finished: Tensor, recording: Recording) -> None:
    """Puts a request into the buffers, its prompts read."""
    for name in ("user", "weight", "stop", "uniform"):
        if (tensor := getattr(recording.request, name)) is not None:
            tensor.copy_(getattr(request, name))
    for kept, new in zip(recording.state, begin(both, reward_model, request, finished), strict=True):
        kept.copy_(new)
    for cache in recording.caches:
        cache.count_on_device()
    recording.output.restart()


def _step(both: TwoPasses | OnePass, folded, recording: Recording) -> None:
    state, token, slot = choose(both, folded, recording.request, recording.output, recording.state)
    for kept, new in zip(recording.state, state._replace(logits=both.follow(token, slot)), strict=True):
        kept.copy_(new)


def _capture(step: Callable[[], None], device: torch.device) -> Callable[[], object]:
    """The step as a graph; on a CPU, which has none, the step itself."""
    if device.type == "cpu":
        return step
    apart = torch.cuda.Stream()
    apart.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(apart):  # libraries set themselves up in their first calls, which a capture forbids
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(apart)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


def _widened(request: Request, rows: int, steps: int) -> Request:
    """The request with so many rows, those beyond its own like the first, and noise for so many steps; all in new memory."""
    row = torch.arange(rows)
    row = row.where(row < len(request.user), 0)
    take = lambda tensor: tensor[row.to(tensor.device)]  # noqa: E731
    uniform = request.uniform
    if uniform is not None:
        uniform = F.pad(take(uniform.T), (0, steps - len(uniform))).T.contiguous()
    return replace(
        request, input_ids=take(request.input_ids), attention_mask=take(request.attention_mask), user=take(request.user),
        weight=take(request.weight), stop=request.stop.clone(), uniform=uniform, token_callback=None,
    )  # fmt: skip


def _key(policy, reward_model: RewardModel, way: type, request: Request, places: int) -> tuple:
    """What a recording is for. Weights may change where they lie, as far as the head has not folded them."""
    numbers = (
        len(request.user), places, len(request.stop), request.num_candidates, request.pad_id, request.vocabulary,
        request.eos_reward, request.prefix_mean, request.temperature,
    )  # fmt: skip
    weights = tuple(p.data_ptr() for model in (policy, reward_model.backbone) for p in model.parameters())
    head = tuple((t.data_ptr(), t._version, t.shape) for t in reward_model.head.state_dict(keep_vars=True).values())
    return way, lora.active(reward_model.backbone), numbers, weights, head
