"""Passes of transformers' own modules: policy and reward model each in its own, or both in one where they share weights.

`join` reads prompts, `branch` runs the reward model on all candidates of a step, `follow` appends the chosen one. Rows that
have finished get any numbers. Nothing is read back from the device, so that a step can be captured.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from pyargs.lm import lora
from pyargs.lm.cache import RowCache, additive, cache_name, parameters, positions
from pyargs.lm.forward import embedded, logits_of, plain_output_layer
from pyargs.lm.fused_modules import takes_lengths
from pyargs.lm.structure import may_replace
from pyargs.lm.tokenize import left_pad

MOST_ROWS = {"cuda": 256, "cpu": 32}
"""Rows of a pass up to which reading the weights takes longer than computing, so that one pass of 2 k rows costs less than two
passes. Computed for GPUs, measured for CPUs (docs/findings)."""


def _known(model, more: dict) -> dict:
    """The keywords without `logits_to_keep`, for models that do not take it and give the logits of all positions."""
    return {name: value for name, value in more.items() if name in parameters(type(model))}


def _mask(mask: Tensor | None, model) -> Tensor | None:
    return None if mask is None else additive(mask, model)


PLACES = 64
"""A cache's capacity is a multiple of it, so that it seldom grows."""


class Half:
    """What both halves do with the rows of their caches. Weights are not copied, so they are always the models' own.

    reader: the cache of the one prompt that is being read in parts. A captured step may write to any row of `cache`.
    """

    def __init__(self, model, room: int):
        self.cache, self.reader = (
            RowCache(model.config.get_text_config(decoder=True), rows, 0, model.device) for rows in (room, 1)
        )

    def unread(self) -> None:
        """The prompt of which a part was read does not come."""
        self.reader.keep([])

    def reserve(self, capacity: int) -> None:
        """Room for so many tokens of each row."""
        _reserve(self.cache, capacity)

    def current(self) -> bool:
        return True

    def keep(self, order: Sequence[int]) -> None:
        """The rows at these positions stay, in this order."""
        self.cache.keep(order)


class Policy(Half):
    """The policy's half: logits behind the tokens of the rows at the positions 0, 1, ... Its model shares nothing."""

    screened = False
    top = 0  # all logits are exact

    def __init__(self, lm, room: int):
        super().__init__(lm, room)
        self.lm = lm

    def read(self, prompt: Sequence[int], end: int, capacity: int) -> int:
        """Reads a prompt up to `end`; returns how many of its tokens are read. `join` has it first and reads the rest."""
        return _read(self.lm, self.reader, [prompt], end, capacity, logits_to_keep=1)

    def join(self, prompts: Sequence[Sequence[int]], capacity: int, soft: Tensor | None = None) -> Tensor:
        """Adds rows behind those that are here and reads their prompts; returns logits [m, V] of their first tokens.

        capacity: places that the longest of them needs. soft [m, L, D]: embeddings that stand before the prompts.
        """
        return _join(self.lm, self, prompts, capacity, "logits", soft=soft, logits_to_keep=1)

    def advance(self, token: Tensor, going: Tensor | None = None) -> Tensor:
        """Appends token [n] to each row where going [n] (all by default); returns the next token's logits [n, V]."""
        logits = _pass(self.lm, token.to(self.lm.device).unsqueeze(1), self.cache, logits_to_keep=1).logits[:, -1]
        self.cache.advance(None if going is None else going.to(self.lm.device))
        return logits


class Scorer(Half):
    """The reward model's half: states of candidates behind the tokens of the rows.

    leaves_out: a pass has as many candidates of each row as the row that wants most: on a CPU, where reading that is free."""

    def __init__(self, backbone, room: int):
        super().__init__(backbone, room)
        self.backbone, self.leaves_out = backbone, backbone.device.type == "cpu"

    def read(self, prompt: Sequence[int], end: int, capacity: int) -> int:
        """As `Policy.read`."""
        return _read(self.backbone, self.reader, [prompt], end, capacity)

    def join(self, prompts: Sequence[Sequence[int]], capacity: int) -> Tensor:
        """As `Policy.join`: the states [m, D] of the prompts' last tokens."""
        return _join(self.backbone, self, prompts, capacity, "last_hidden_state")

    def branch(self, candidates: Tensor, wanted: Tensor | None = None) -> Tensor:
        """States [n, k, D] of candidates [n, k], each behind its row's tokens. Those outside `wanted` may be any."""
        states = _pass(self.backbone, _few(candidates, wanted), self.cache).last_hidden_state
        return _wide(states, candidates.shape[1])

    def tree(self, ids: Tensor, place: Tensor, seen: Tensor) -> Tensor:
        """States [n, S, D] of tokens ids [n, S] that stand at `place` int64 [n, S] behind their row's tokens, and see these
        and each other where seen bool [n, S, S] says so. `cache.graft` appends some of them."""
        position, mask = self.cache.position + place, self.cache.tree(seen)
        return _call(self.backbone, self.cache, mask, position, {"input_ids": ids}, {}).last_hidden_state

    def commit(self, token: Tensor, slot: Tensor) -> None:
        """Appends token [n], the candidate at slot [n], to each row; a slot of -1 leaves its row."""
        self.cache.commit(slot)

    def advance(self, token: Tensor, going: Tensor | None = None) -> None:
        """Appends token [n], a candidate or not, to each row where going [n]."""
        _pass(self.backbone, token.to(self.backbone.device).unsqueeze(1), self.cache)
        self.cache.advance(None if going is None else going.to(self.backbone.device))


class Shared:
    """Both halves in one pass over the weights that they share. With LoRA every row is there twice: without LoRA for the
    policy, then with it for the reward model. The output layer is applied to the winners only."""

    screened = False
    top = 0  # all logits are exact

    def __init__(self, policy, backbone, room: int):
        self.policy, self.backbone = policy, backbone
        self.leaves_out = backbone.device.type == "cpu"  # as of Scorer
        self.times = 2 if lora.active(backbone) else 1
        config = backbone.config.get_text_config(decoder=True)
        self.cache, self.reader = (RowCache(config, rows * self.times, 0, backbone.device) for rows in (room, 1))

    def read(self, prompt: Sequence[int], end: int, capacity: int) -> int:
        with self._lora():
            return _read(self.backbone, self.reader, [prompt] * self.times, end, capacity)

    def unread(self) -> None:
        self.reader.keep([])

    def join(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[Tensor, Tensor]:
        """Logits [m, V] of the first tokens, and the reward model's states [m, D] of the prompts' last ones."""
        twice = [prompt for prompt in prompts for _ in range(self.times)]
        with self._lora():
            state = _join(self.backbone, self, twice, capacity, "last_hidden_state")
        self.states = state.new_zeros(
            self.cache.width // self.times, 0, state.shape[-1]
        )  # of candidates, as the policy sees them
        return logits_of(self.policy, state[:: self.times]), state[self.times - 1 :: self.times]

    def branch(self, candidates: Tensor, wanted: Tensor | None = None) -> Tensor:
        with self._lora():
            states = _pass(self.backbone, self._each(_few(candidates, wanted)), self.cache).last_hidden_state
        states = _wide(states, candidates.shape[1])
        self.states = states[:: self.times]
        return states[self.times - 1 :: self.times]

    def follow(self, token: Tensor, slot: Tensor, stay: bool = False) -> Tensor:
        """Appends token [n], the candidate at slot [n], to each row; returns the next token's logits [n, V]."""
        self.cache.commit(self._each(slot))
        place = slot.clamp(min=0)[:, None, None].expand(-1, 1, self.states.shape[-1])
        return logits_of(self.policy, self.states.gather(1, place).squeeze(1))

    def current(self) -> bool:
        """Whether both models still rest on the same weights."""
        adapted = lora.active(self.backbone) == (self.times == 2)
        return adapted and lora.same_weights(self.policy.get_decoder(), self.backbone)

    def keep(self, order: Sequence[int]) -> None:
        self.cache.keep([row * self.times + one for row in order for one in range(self.times)])
        self.states = self.states[list(order)]

    @property
    def halves(self) -> tuple[Shared]:
        return (self,)

    def _each(self, values: Tensor) -> Tensor:
        """As often as a row stands in the cache."""
        return values if self.times == 1 else values.repeat_interleave(self.times, 0)

    def _lora(self):
        return lora.on_second(self.backbone) if self.times == 2 else nullcontext()


def shares(policy, backbone, rows: int, k: int) -> bool:
    """Whether one pass serves both halves, and is faster for so many rows and candidates."""
    free = not lora.active(backbone) or (lora.linear_only(backbone) and 2 * rows * k <= MOST_ROWS.get(backbone.device.type, 0))
    if not (free and may_replace(policy, backbone)):
        return False
    return lora.same_weights(policy.get_decoder(), backbone) and plain_output_layer(policy)


def _few(candidates: Tensor, wanted: Tensor | None) -> Tensor:
    """The first columns of candidates [n, k], up to the last one that a row wants."""
    return candidates if wanted is None else candidates[:, : int(wanted.any(0).nonzero().max()) + 1]


def _wide(states: Tensor, k: int) -> Tensor:
    """States [n, k, D] of these, 0 behind them."""
    return states if states.shape[1] == k else F.pad(states, (0, 0, 0, k - states.shape[1]))


def _reserve(cache: RowCache, capacity: int) -> None:
    cache.reserve(-(-capacity // PLACES) * PLACES)


def _join(model, held, prompts, capacity: int, field: str, *, soft: Tensor | None = None, **more) -> Tensor:
    """What passes over prompts give of each one's last token; the first are those that `held.reader` has a part of."""
    _reserve(held.cache, capacity)
    found, first = [], len(held.reader.lengths)
    if first:
        rest = [prompt[held.reader.lengths[0] :] for prompt in prompts[:first]]
        found.append(_follow(model, rest, held.reader, more)[field][:, -1])
        held.cache.take(held.reader)
    if prompts[first:]:
        found.append(_begin(model, prompts[first:], held.cache, soft, more)[field][:, -1])
    return found[0] if len(found) == 1 else torch.cat(found)


def _read(model, reader: RowCache, prompts, end: int, capacity: int, **more) -> int:
    """Reads equal prompts up to `end`."""
    _reserve(reader, capacity)
    start = reader.lengths[0] if reader.lengths else 0
    part = [prompt[start:end] for prompt in prompts]
    _follow(model, part, reader, more) if start else _begin(model, part, reader, None, more)
    return end


def _begin(model, prompts, cache: RowCache, soft: Tensor | None, more: dict):
    ids, mask = (x.to(model.device) for x in left_pad([list(prompt) for prompt in prompts], 0))
    inputs = {"input_ids": ids}
    if soft is not None:
        embeds, mask = embedded(model, prompts, soft)
        inputs = {"inputs_embeds": embeds}
    seen = cache.join(mask)
    return _call(model, cache, seen, positions(mask), inputs, more)


def _follow(model, parts, cache: RowCache, more: dict):
    ids = torch.tensor([list(part) for part in parts], device=model.device)
    position = cache.position + torch.arange(ids.shape[1], device=model.device)
    return _call(model, cache, cache.follow(ids.shape[1]), position, {"input_ids": ids}, more)


def _pass(model, ids: Tensor, cache: RowCache, **more):
    position = cache.position.expand(ids.shape)
    seen = cache.branches(ids.shape[1], takes_lengths(model))
    return _call(model, cache, seen, position, {"input_ids": ids}, more)


def _call(model, cache: RowCache, seen: Tensor | None, position: Tensor, inputs: dict, more: dict):
    return model(
        **inputs,
        attention_mask=_mask(seen, model),
        position_ids=position,
        use_cache=True,
        **{cache_name(model): cache},
        **_known(model, more),
    )
