"""ARGS on a GPU: the whole step as one CUDA graph, replayed without a word from the host.

A graph has fixed shapes and addresses. So the rows and the caches' places are rounded up (a batch of 5 runs as one of 8, the
rows too many finished from the start), lengths and counters are tensors on the device, and what a step hands to the next is
copied back to where it came from. NOT YET RUN ON A GPU: the tests record the operators of a step and replay those.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor
from torch.nn import functional as F

from pyargs.decode.answer import Output
from pyargs.decode.backends import eager
from pyargs.decode.backends.eager import OnePass, TwoPasses
from pyargs.decode.loop import State, begin, choose
from pyargs.decode.request import BatchRequest
from pyargs.heads import Folded
from pyargs.lm.cache import PrefixCache
from pyargs.lm.fused_modules import few_launches
from pyargs.lm.structure import contents, may_replace, structure
from pyargs.models.reward_model import RewardModel
from pyargs.types import Decoded

PLACES = 256
"""The caches' capacity is a multiple of it."""
KEPT = 4
"""Recordings of one reward model; each holds caches and a graph, and the one not used for longest makes room."""
TRIALS = 2
"""Steps before the capture: libraries set themselves up in their first calls, which a capture forbids."""


@dataclass
class Recording:
    """The buffers that a captured step reads and writes, and `replay`, which runs it on them.

    policy is a weak reference: a recording is no use to another policy, whose weights may lie where this one's lay. models:
    what policy, backbone and head were, attributes and all, whose numbers a graph keeps.
    """

    policy: ref
    models: list[dict]
    request: BatchRequest
    output: Output
    state: State
    caches: tuple[PrefixCache, ...]
    folded: Folded
    replay: Callable[[], object] | None = None


recordings: WeakKeyDictionary[RewardModel, dict[tuple, Recording]] = WeakKeyDictionary()
refused: WeakKeyDictionary[RewardModel, WeakSet] = WeakKeyDictionary()  # the policies with which a capture failed
_capturing = threading.Lock()


def possible(policy, reward_model: RewardModel) -> bool:
    """Whether a captured step is worth trying: both models on one GPU, and no attempt of theirs has failed."""
    if not may_replace(policy, reward_model.backbone, reward_model.head):
        return False
    devices = {policy.device, reward_model.device, reward_model.backbone.device}
    return len(devices) == 1 and devices.pop().type == "cuda" and policy not in refused.get(reward_model, ())


@torch.no_grad()
def decode(policy, reward_model: RewardModel, request: BatchRequest) -> Decoded | None:
    """As `pyargs.decode.args.decode`, through a captured step; None, with a warning, where these models allow none."""
    device, k = request.user.device, request.num_candidates
    rows = 1 << (len(request.user) - 1).bit_length()
    places = request.input_ids.shape[1] + request.max_new_tokens + TRIALS + k
    places = -(-places // PLACES) * PLACES
    way = eager.of(policy, reward_model, rows, k)
    wide = _widened(request, rows, places)
    finished = torch.arange(rows, device=device) >= len(request.user)
    kept = recordings.setdefault(reward_model, {})
    key = _key(policy, reward_model, way, wide, places)

    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        recording = kept.pop(key, None)  # while in use it is nobody else's
        models = [structure(part) for part in (policy, reward_model.backbone, reward_model.head)]
        if recording is None or recording.policy() is not policy or recording.models != models:
            while len(kept) >= KEPT:
                kept.pop(next(iter(kept)), None)
            try:
                recording = _record(policy, reward_model, way, wide, finished, places)
            except torch.cuda.OutOfMemoryError:
                if not kept:
                    raise
                kept.clear()  # their caches make room
                torch.cuda.empty_cache()
                recording = _record(policy, reward_model, way, wide, finished, places)
            if recording is None:
                return None
        folded = reward_model.head.fold(wide.user)
        _start(way(policy, reward_model, recording.caches), wide, folded, finished, recording)
        try:
            for step in range(request.max_new_tokens):
                recording.replay()
                if recording.output.stop(request, step, recording.state.finished):
                    break
            return recording.output.decoded(request, recording.state.finished)
        finally:
            kept[key] = recording


def _record(policy, reward_model: RewardModel, way: type, request: BatchRequest, finished: Tensor, places: int):
    """A Recording of the step for requests like this one; None, with a warning, where it cannot be captured."""
    device = request.user.device
    caches = way.caches(policy, reward_model, len(finished), places)
    both = way(policy, reward_model, caches)
    folded = Folded(*(_cloned(part) for part in reward_model.head.fold(request.user)))
    state = State(*(tensor.clone() for tensor in begin(both, folded, request, finished)))
    for cache in caches:
        cache.count_on_device()
    output = Output(len(finished), places, device)
    models = [structure(part) for part in (policy, reward_model.backbone, reward_model.head)]
    recording = Recording(ref(policy), models, request, output, state, caches, folded)
    step = partial(_step, both, recording)
    with _capturing, few_launches(policy.get_decoder(), reward_model.backbone):
        try:
            recording.replay = capture(step, device)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what CUDA says of a call that a capture forbids, such as a read by the host
            refused.setdefault(reward_model, WeakSet()).add(policy)
            warnings.warn(
                f"a decoding step of {type(policy).__name__} and {type(reward_model.backbone).__name__} cannot be "
                f"captured as a CUDA graph: each is launched kernel by kernel, which is slower ({error})",
                stacklevel=6,
            )
            return None
    return recording


def _start(both: TwoPasses | OnePass, request: BatchRequest, folded: Folded, finished: Tensor, recording: Recording) -> None:
    """Puts a request and its users into the buffers, its prompts read."""
    for name in ("weight", "stop", "uniform"):
        if (tensor := getattr(recording.request, name)) is not None:
            tensor.copy_(getattr(request, name))
    for kept, new in zip(recording.folded, folded, strict=True):
        if isinstance(kept, Tensor):
            kept.copy_(new)
    for kept, new in zip(recording.state, begin(both, recording.folded, request, finished), strict=True):
        kept.copy_(new)
    for cache in recording.caches:
        cache.count_on_device()
    recording.output.restart()


def _cloned(part):
    return part.clone() if isinstance(part, Tensor) else part


def _step(both: TwoPasses | OnePass, recording: Recording) -> None:
    state, token, slot = choose(both, recording.folded, recording.request, recording.output, recording.state)
    for kept, new in zip(recording.state, state._replace(logits=both.follow(token, slot, state.finished)), strict=True):
        kept.copy_(new)


def capture(step: Callable[[], None], device: torch.device) -> Callable[[], object]:
    """The step as a graph, after trial steps in which a call that waits for the device raises: a capture that fails midway
    can leave its stream unusable."""
    graph, apart, now = torch.cuda.CUDAGraph(), torch.cuda.Stream(device), torch.cuda.current_stream(device)
    apart.wait_stream(now)
    waits = torch.cuda.get_sync_debug_mode()
    with torch.cuda.stream(apart):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(TRIALS - 1):
                step()
        finally:
            torch.cuda.set_sync_debug_mode(waits)
        with torch.cuda.graph(graph, stream=apart, capture_error_mode="thread_local"):
            step()
    now.wait_stream(apart)
    return graph.replay


def _widened(request: BatchRequest, rows: int, steps: int) -> BatchRequest:
    """The request with so many rows, those beyond its own like the first, and noise for so many steps; all in new memory."""
    row = torch.arange(rows, device="cpu")
    row = row.where(row < len(request.user), 0)

    def take(tensor: Tensor) -> Tensor:
        return tensor[row.to(tensor.device)]

    uniform = request.uniform
    if uniform is not None:
        uniform = F.pad(take(uniform.T), (0, steps - len(uniform))).T.contiguous()
    return replace(
        request,
        input_ids=take(request.input_ids),
        attention_mask=take(request.attention_mask),
        user=take(request.user),
        weight=take(request.weight),
        stop=request.stop.clone(),
        uniform=uniform,
        token_callback=None,
    )


def _key(policy, reward_model: RewardModel, way: type, request: BatchRequest, places: int) -> tuple:
    """What a recording is for. Weights may change where they lie, but not those that the head folds: these are read. Users are
    in the buffers: they may come, go and change, and their table may move."""
    numbers = (
        len(request.user),
        places,
        len(request.stop),
        request.num_candidates,
        request.pad_id,
        request.vocabulary,
        request.eos_reward,
        request.prefix_mean,
        request.temperature,
        request.uniform is None,
    )
    models = policy, reward_model.backbone
    head = [part for name, part in reward_model.head.state_dict(keep_vars=True).items() if not name.startswith("users.")]
    own = tuple((name, value.shape[1:]) for name, value in reward_model.users.vectors.items())
    weights = tuple(t.data_ptr() for model in models for t in (*model.parameters(), *model.buffers()))
    places = tuple((t.data_ptr(), t.shape) for t in head)
    return way, numbers, weights, places, own, tuple(contents(head))
