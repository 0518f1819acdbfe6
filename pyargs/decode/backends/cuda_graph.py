"""A guided step on a GPU as one CUDA graph, replayed without a word from the host.

A graph has fixed shapes and addresses. So it is captured for a number of rows (1, 2, 4, ... up to the room), of which those
beyond the rows that are here have finished. It looks at all places of the caches. What a row brings lies in buffers that stay
where they are: rows come and go, and users too, without a new capture. The host reads what a step chose some steps later.
NOT YET RUN ON A GPU: the tests record the operators of a step and replay those.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from pyargs.decode.args import CANDIDATES, Guided
from pyargs.decode.backends.capture import capture
from pyargs.decode.genarm import Tokenwise
from pyargs.decode.request import Request
from pyargs.decode.rows import Choice
from pyargs.decode.steps import read, unread
from pyargs.errors import PyargsError
from pyargs.lm.cache import RowCache, can_branch
from pyargs.lm.fused_modules import few_launches
from pyargs.lm.structure import as_written, contents, structure
from pyargs.models.reward_model import RewardModel
from pyargs.ops import row_state

CHUNK = 4
"""Steps until a choice is read: by then it has arrived, and the host has launched the next ones."""
PLACES = 256
"""The caches' capacity is a multiple of it, so that they seldom grow: a graph knows where they lie."""
KEPT = 6
"""Recordings of an engine; the one that was not used for longest makes room."""
WRITTEN = "logits", "rewards", "above", "told", *CANDIDATES, *row_state.WRITTEN
"""The buffers that a step writes."""

_capturing = threading.Lock()


class Refused(PyargsError):
    """A step cannot be captured. The rows are as they were before it."""


class Recording(NamedTuple):
    """replay: computes the step. kept: what it reads and nobody else may keep, the folded head and tables of angles."""

    replay: Callable[[], object]
    kept: object


def refusal(guide, *models, by_text: bool = False) -> str | None:
    """Why steps of these language models are not captured; None where it is tried. guide: the RewardModel or TokenReward that
    guides them, if any; by_text: it reads texts."""
    devices = {part.device for part in (*models, guide) if part is not None}
    if len(devices) > 1 or devices.pop().type != "cuda":
        return "policy and reward model are not on one GPU"
    if by_text:
        return "the reward model reads texts, which the host makes"
    if guide is None:
        return "only a step that a reward guides is captured so far"
    if not as_written(*models, *([guide.head] if isinstance(guide, RewardModel) else [])):
        return "hooks or replaced modules"
    if not all(map(can_branch, models)):
        return "candidates cannot share a prefix"
    return None


def check_adjust(requests: Sequence[Request]) -> None:
    """Raises PyargsError for a request whose logits the host is to change in the middle of a step."""
    if any(one.adjust is not None for one in requests):
        raise PyargsError("a captured step has no place for adjust: make the engine with backend='eager'")


class Captured:
    """The steps of `rows`, which have eager passes, as replays of captured ones, with the functions of `decode.steps.Steps`.
    Choices are read CHUNK steps later. models: the language models of policy and reward model."""

    def __init__(self, rows: Guided | Tokenwise, *models):
        self.rows, self.models = rows, models
        self.recordings: dict[tuple, Recording] = {}
        self._now: Recording | None = None  # the one for the rows that are here
        self._memory: list | None = None
        self._flying: deque[list[Callable[[], Tensor]]] = deque()
        self._taken: list[int] = []  # steps of each row that is here
        self._made_for = self._structures()
        for half in rows.halves:
            half.leaves_out = False  # which reads numbers on the host

    def join(self, requests: Sequence[Request], capacity: int) -> None:
        check_adjust(requests)
        self.rows.join(requests, -(-capacity // PLACES) * PLACES)
        self._taken += [0] * len(requests)
        self._now = None

    def read(self, prompt: Sequence[int], end: int, capacity: int) -> int:
        return read(self.rows, prompt, end, -(-capacity // PLACES) * PLACES)

    def unread(self) -> None:
        unread(self.rows)

    def step(self) -> list[Choice]:
        """Raises Refused where the step cannot be captured."""
        if self._now is None:
            self._now = self._recording()
        self._now.replay()
        rows = self.rows.rows
        parts = [rows["chosen"], *([rows["told"][:, : 1 + rows.most]] if rows.telling else [])]
        self._flying.append([_on_its_way(part) for part in parts])
        self._taken = [steps + 1 for steps in self._taken]
        ended = any(steps >= one.max_new_tokens for steps, one in zip(self._taken, self.rows.rows.requests, strict=True))
        return self._read(0 if ended else CHUNK)

    def flush(self) -> list[Choice]:
        return self._read(0)

    def keep(self, order: Sequence[int]) -> None:
        self.rows.keep(order)
        self._taken = [self._taken[position] for position in order]
        self._now = None

    def current(self) -> bool:
        """Reads the head's weights."""
        try:
            return self._structures() == self._made_for
        except PyargsError:  # a hook, or a function in the place of another
            return False

    def recover(self, error: BaseException) -> bool:
        """As of `Steps`. The recordings stay, except where memory was missing: theirs makes room."""
        if isinstance(error, torch.cuda.OutOfMemoryError):
            return False
        try:
            self._flying.clear()
            self.keep([])
            self.unread()
        except Exception:  # what was to be made is not there, or the device does not go on
            return False
        return True

    def _read(self, left: int) -> list[Choice]:
        """The choices that are on their way, but for the last `left`; waits for them."""
        found, count = [], len(self._taken)
        while len(self._flying) > left:
            choice = Choice.read(*(read() for read in self._flying.popleft()))
            found.append(choice)
            for cache in self._caches:  # what was followed on the device
                times = len(cache.lengths) // count
                going = (~choice.finished).repeat_interleave(times).tolist()
                cache.lengths = [length + more for length, more in zip(cache.lengths, going, strict=True)]
        return found

    def _recording(self) -> Recording:
        """That of the rows that are here, captured where there is none."""
        rows = self.rows
        if (memory := self._places()) != self._memory:  # what is recorded reads elsewhere
            self.recordings.clear()
            self._memory = memory
        bucket = min(1 << (len(self._taken) - 1).bit_length(), rows.rows.room)
        key = bucket, *rows.kind
        found = self.recordings.get(key) or self._record(bucket)
        self.recordings.pop(key, None)
        self.recordings[key] = found  # the one used last stands last
        while len(self.recordings) > KEPT:
            del self.recordings[next(iter(self.recordings))]
        return found

    @property
    def _caches(self) -> list[RowCache]:
        return [half.cache for half in self.rows.halves]

    def _places(self) -> list:
        """Where a step reads what is no weight. Users are in the buffers: their table may move."""
        caches = self._caches
        states = [states for cache in caches for layer in cache.layers for states in (layer.keys, layer.values)]
        memory = [*self.rows.rows.buffers.values(), *states, *(cache.length for cache in caches)]
        return [(one.data_ptr(), one.shape) for one in memory]

    def _structures(self) -> tuple:
        """What a recording keeps of the models besides the place of their weights. Of the head also their numbers: folding may
        make others of them."""
        models, head = [structure(model) for model in self.models], self.rows.head
        if head is None:
            return models, {}, []
        shape = {name: described for name, described in structure(head).items() if not name.startswith(".users")}
        weights = [one for name, one in head.state_dict(keep_vars=True).items() if not name.startswith("users.")]
        return models, shape, contents(weights)

    def _record(self, bucket: int) -> Recording:
        """Captures the step for so many rows. All have finished meanwhile, so that those in the middle of an answer stay as
        they are: what a step writes for such rows is put back, or lies behind their prefixes."""
        try:
            return self._try_to_record(bucket)
        except torch.cuda.OutOfMemoryError:
            if not self.recordings:
                raise
            self.recordings.clear()  # their memory makes room
            torch.cuda.empty_cache()
            return self._try_to_record(bucket)

    def _try_to_record(self, bucket: int) -> Recording:
        decoder, rows, caches = self.rows, self.rows.rows, self._caches
        policy, reward = self.models
        places = max(cache.capacity for cache in caches)

        def step() -> None:
            decoder.choose()
            decoder.follow(stay=True)

        before = {name: rows.buffers[name].clone() for name in WRITTEN if name in rows}
        try:
            rows.width = bucket
            rows.buffers["finished"].fill_(True)
            for cache in caches:
                cache.captured = bucket * (cache.room // rows.room)
            on_device = torch.cuda.device(decoder.device) if decoder.device.type == "cuda" else nullcontext()
            with on_device, _capturing, few_launches(*map(_decoder, self.models), places=places) as tables:
                return Recording(capture(step, decoder.device), (decoder.folded, tables))
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what CUDA says of a call that a capture forbids, such as a read by the host
            raise Refused(
                f"a decoding step of {type(policy).__name__} and {type(reward).__name__} cannot be captured as a CUDA graph "
                f"({error}): take backend='eager', or 'auto'"
            ) from error
        finally:
            rows.width = rows.count
            for cache in caches:
                cache.captured = 0
            for name, value in before.items():
                rows.buffers[name].copy_(value)


def _decoder(model):
    """A language model without its output layer, if it has one."""
    return model if model.get_output_embeddings() is None else model.get_decoder()


def _on_its_way(values: Tensor) -> Callable[[], Tensor]:
    """Starts a copy to the host, behind what is being computed; what is returned waits for it."""
    if not values.is_cuda:
        copy = values.clone()
        return lambda: copy
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    arrived = torch.cuda.current_stream(values.device).record_event()

    def read() -> Tensor:
        arrived.synchronize()
        return host

    return read
