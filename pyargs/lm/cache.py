"""The KV cache of the decoders: one prefix per row, from which several next tokens can branch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache as once
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from pyargs.errors import PyargsError
from pyargs.lm.structure import attention_of, may_replace, outline, unwrapped
from pyargs.ops.commit import MOST, commit


class PrefixLayer(CacheLayerMixin):
    """Keys and values [B, heads, capacity, head_dim] of one layer, of which the first `length` places are the prefix.

    `update` writes behind the prefix and returns the places in use; the prefix does not become longer. The owner of the layer
    then sets `length` to what stays.
    """

    is_sliding = False

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, _ = key_states.shape
        self.keys = key_states.new_zeros(batch, heads, self.capacity, key_states.shape[-1])
        self.values = value_states.new_zeros(batch, heads, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length  # models ask where they are given no position_ids

    def get_max_length(self) -> int:
        return self.capacity


def copy_rows(cache: Cache, row: Tensor, capacity: int) -> None:
    """Makes copies of a cache's rows, of which only the newest place will differ; row int64 [B * k] is what each copy holds.
    capacity: places of each. Raises PyargsError for a cache that holds more than transformers' own."""
    if type(cache).__module__ != DynamicLayer.__module__:  # nobody promises that all of it is copied
        raise PyargsError(
            f"a {type(cache).__name__} holds more than transformers' own caches: candidates can not be tried here"
        )
    cache.reorder_cache(row)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:  # it would copy all its keys and values at every token
            length = layer.get_seq_length()
            cache.layers[i] = PrefixLayer(capacity)
            cache.layers[i].update(layer.keys, layer.values)
            cache.layers[i].length = length


def follow_copies(cache: Cache, winner: Tensor) -> None:
    """All copies continue their row's winner; winner int64 [B * k] is the number of that copy."""
    for layer in cache.layers:
        if type(layer) is PrefixLayer:  # the copies differ in their newest place only
            for states in (layer.keys, layer.values):
                states[:, :, layer.length] = states[winner, :, layer.length]
            layer.length += 1
        else:
            layer.reorder_cache(winner)


class RowLayer(CacheLayerMixin):
    """Keys and values [room, heads, capacity, head_dim] of one layer of a RowCache, which says where a pass writes."""

    is_sliding = False

    def __init__(self, room: int, capacity: int):
        super().__init__()
        self.room, self.capacity = room, capacity
        self.writes: Prompts | Branches | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        _, heads, _, _ = key_states.shape
        self.keys = key_states.new_zeros(self.room, heads, self.capacity, key_states.shape[-1])
        self.values = value_states.new_zeros(self.room, heads, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self.writes.write(self.keys, key_states), self.writes.write(self.values, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.writes.seen(query_length), 0

    def get_seq_length(self) -> int:
        return self.writes.before  # models ask where they are given no position_ids

    def get_max_length(self) -> int:
        return self.capacity


class Prompts(NamedTuple):
    """A pass over the prompts of the rows first, first + 1, ...; each sees only itself.

    order int64 [m, T]: the tokens of each row without its padding, which stands on the left; None where none is padded.
    """

    first: int
    order: Tensor | None
    before: int = 0

    def seen(self, new: int) -> int:
        return new

    def write(self, kept: Tensor, new: Tensor) -> Tensor:
        rows, heads, length, width = new.shape
        kept = kept[self.first : self.first + rows]
        kept[:, :, length:].zero_()  # a place that no mask lets through still must not hold what is not a number
        if self.order is None:
            kept[:, :, :length] = new
        else:
            kept[:, :, :length] = new.gather(2, self.order[:, None, :, None].expand(rows, heads, length, width))
        return new


class Branches(NamedTuple):
    """A pass over next tokens of the first rows, each behind its row's prefix: token j of row i is written to place[i, j].

    row int64 [n, 1]; end: the places that the pass looks at.
    """

    row: Tensor
    place: Tensor
    end: int
    before: int

    def seen(self, new: int) -> int:
        return self.end

    def write(self, kept: Tensor, new: Tensor) -> Tensor:
        kept = kept[: len(self.row)]
        kept.transpose(1, 2).index_put_((self.row, self.place), new.transpose(1, 2))
        return kept[:, :, : self.end]


class RowCache(Cache):
    """A RowLayer for each layer of a full-attention model; rows join, branch, advance and leave, each of its own length.

    config: of the model; room: the most rows; capacity: places of each row, for its prompt, its answer, and the branches
    behind that. The rows that are here stand at the positions 0, 1, ... without a gap. `lengths` are the lengths of their
    prefixes on the host, `length` int64 [room] the same on the device, 0 beyond. With `captured`, a number of rows, every pass
    has so many rows and reads all places, so that it does not depend on the lengths. The host does not follow them then:
    `lengths` is set by the caller.
    """

    def __init__(self, config, room: int, capacity: int, device):
        super().__init__(layers=[RowLayer(room, capacity) for _ in range(config.num_hidden_layers)])
        self.room, self.capacity, self.captured = room, capacity, 0
        self.lengths: list[int] = []
        self.length = torch.zeros(room, dtype=torch.long, device=device)
        self._place = torch.arange(capacity, device=device)
        self._row = torch.arange(room, device=device).unsqueeze(1)
        self._lists: dict[int, list[list[Tensor]]] = {}

    def join(self, mask: Tensor) -> Tensor | None:
        """Adds rows, with prompts where mask [m, T] is not 0, padded on the left. Returns the attention mask [m, 1, T, T]
        of the pass over them, which must come next, or None for causal attention."""
        first, length = len(self.lengths), mask.shape[1]
        own = mask.sum(1)
        self.lengths += own.tolist()
        self.length[first : first + len(mask)] = own
        padded = min(self.lengths[first:]) < length
        place = torch.arange(length, device=mask.device)
        order = (place + (length - own).unsqueeze(1)) % length if padded else None
        for layer in self.layers:
            layer.writes = Prompts(first, order)
        if not padded:
            return None
        seen = mask.bool()[:, None, None] & (place <= place[:, None])
        return seen | (place == place[:, None])  # padding sees itself, since a softmax over nothing is not a number

    @property
    def width(self) -> int:
        """Rows of a pass."""
        return self.captured or len(self.lengths)

    @property
    def position(self) -> Tensor:
        """Of each row's next token, int64 [n, 1]."""
        return self.length[: self.width].unsqueeze(1)

    def branches(self, count: int, by_length: bool = False) -> Tensor | None:
        """Attention mask [n, 1, count, places] for the next pass, in which each token sees its row's prefix and itself. None
        where a single token sees all places. by_length: in a captured pass the lengths int64 [n, 1, 1, 1] instead, for an
        attention that takes these."""
        n = self.width
        place = self.position + self._place[:count]
        longest = 0 if self.captured else max(self.lengths)
        end = self.capacity if self.captured else longest + count
        for layer in self.layers:
            layer.writes = Branches(self._row[:n], place, end, longest)
        if self.captured and by_length:
            return self.length[:n].view(n, 1, 1, 1)
        if not self.captured and count == 1 and min(self.lengths) == longest:
            return None
        places = self._place[:end]
        if count == 1:
            return (places <= self.position)[:, None, None]
        return (places < self.position)[:, None, None] | (places == place.unsqueeze(2)).unsqueeze(1)

    def follow(self, count: int) -> Tensor:
        """Attention mask [n, 1, count, places] for the next pass, whose tokens follow each other behind each row's prefix, and
        belong to it afterwards."""
        place = self.position + self._place[:count]
        end = max(self.lengths) + count
        for layer in self.layers:
            layer.writes = Branches(self._row[: self.width], place, end, end - count)
        self.length[: self.width] += count
        self.lengths = [length + count for length in self.lengths]
        return (self._place[:end] <= place.unsqueeze(2)).unsqueeze(1)

    def tree(self, seen: Tensor) -> Tensor:
        """Attention mask [n, 1, count, places] for the next pass, whose tokens see their row's prefix, and those of each other
        that seen bool [n, count, count] says."""
        rows, count, _ = seen.shape
        place = self.position + self._place[:count]
        longest = max(self.lengths)
        for layer in self.layers:
            layer.writes = Branches(self._row[:rows], place, longest + count, longest)
        prefix = self._place[: longest + count] < self.position
        mask = prefix.unsqueeze(1).repeat(1, count, 1)
        return mask.scatter_(2, place.unsqueeze(1).expand(rows, count, count), seen).unsqueeze(1)

    def graft(self, start: Sequence[int], count: Sequence[int]) -> None:
        """Adds to each row's prefix `count` of the tokens that the last pass wrote behind it, from number `start` on."""
        first, new = (torch.tensor(one, device=self.length.device).unsqueeze(1) for one in (start, count))
        offset = self._place[: max(count)]
        to = self.position + offset
        source = to + first * (offset < new)
        for layer in self.layers:
            for states in (layer.keys, layer.values):
                rows = states[: self.width].transpose(1, 2)
                rows[self._row[: self.width], to] = rows[self._row[: self.width], source]
        self.cut([length + more for length, more in zip(self.lengths, count, strict=True)])

    def cut(self, lengths: Sequence[int]) -> None:
        """So much of each row is its prefix."""
        self.lengths = list(lengths)
        self.length[: len(lengths)] = torch.tensor(self.lengths, device=self.length.device)

    def take(self, other: RowCache) -> None:
        """The rows of another cache of the same model come in behind those that are here, and leave that one."""
        first, count = len(self.lengths), len(other.lengths)
        self.lengths += other.lengths
        self.length[first : first + count] = other.length[:count]
        longest = max(other.lengths)
        for layer, source in zip(self.layers, other.layers, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(source.keys, source.values)
            for kept, new in ((layer.keys, source.keys), (layer.values, source.values)):
                kept[first : first + count, :, :longest] = new[:count, :, :longest]
                kept[first : first + count, :, longest:].zero_()  # as `Prompts.write`
        other.keep([])

    def advance(self, going: Tensor | None = None) -> None:
        """Adds the token written behind each row's prefix to the prefix where going bool [n], by default everywhere."""
        self.length[: self.width].add_(1 if going is None else going)
        if not self.captured:
            steps = [1] * len(self.lengths) if going is None else going.tolist()
            self.lengths = [length + step for length, step in zip(self.lengths, steps, strict=True)]

    def commit(self, slot: Tensor) -> None:
        """Adds the branch at slot [n] to its row's prefix and drops the other branches. A slot of -1 leaves its row."""
        for several in self._alike(self.width):
            commit(several, slot.to(several[0].device), self.length[: self.width])
        self.advance(slot.to(self.length.device) >= 0)

    def keep(self, order: Sequence[int]) -> None:
        """The rows at these positions stay, in this order; where a row moves, to a place that is left."""
        for to, source in enumerate(order):
            if to != source:
                for layer in self.layers:
                    if layer.is_initialized:
                        layer.keys[to].copy_(layer.keys[source])
                        layer.values[to].copy_(layer.values[source])
                self.length[to] = self.length[source]
        self.length[len(order) :] = 0
        self.lengths = [self.lengths[source] for source in order]

    def reserve(self, capacity: int) -> None:
        """Room for so many places of each row."""
        if capacity <= self.capacity:
            return
        self._lists.clear()
        for layer in self.layers:
            if layer.is_initialized:  # it may be as long already, where a layer behind it found no memory
                layer.keys, layer.values = (
                    nn.functional.pad(x, (0, 0, 0, max(capacity - x.shape[2], 0))) for x in (layer.keys, layer.values)
                )
            layer.capacity = capacity
        self._place = torch.arange(capacity, device=self.length.device)
        self.capacity = capacity

    def _alike(self, rows: int) -> list[list[Tensor]]:
        """The keys and values of all layers, of the first rows, by device, shape and dtype; mostly one list."""
        if rows not in self._lists:
            alike: dict[tuple, list[Tensor]] = {}
            for layer in self.layers:
                for states in (layer.keys[:rows], layer.values[:rows]):
                    alike.setdefault((states.device, states.shape, states.stride(), states.dtype), []).append(states)
            self._lists[rows] = [several[i : i + MOST] for several in alike.values() for i in range(0, len(several), MOST)]
        return self._lists[rows]


def can_branch(model) -> bool:
    """Whether candidates may share one prefix in a pass: full attention in all layers, which follows mask and positions.

    Config and cache say whether a layer has a window or a state, which a short text would not show. Whether the model follows
    masks and positions (ALiBi does not) is tried on a few tokens, and again when its modules have changed.
    """
    model = unwrapped(model)
    config = model.config.get_text_config(decoder=True)
    known = parameters(type(model))
    attention = attention_of(config)
    if attention not in ("sdpa", "eager") or "position_ids" not in known or not known & set(CACHE_NAMES[:2]):
        return False
    if any(value for name, value in vars(config).items() if name.endswith(WINDOWS)):
        return False
    layers = DynamicCache(config=config).layers
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return False
    try:
        check_layers(model)
    except PyargsError:
        return False
    now = attention, outline(model)
    if _branching.get(model, (None,))[0] != now:
        _branching[model] = now, _branches_rightly(model)
    return _branching[model][1]


WINDOWS = "attention_window", "window_size"
"""How the names end under which configs keep the width of a window that no cache knows of (GPT-Neo's local attention)."""

_branching: WeakKeyDictionary[nn.Module, tuple[tuple, bool]] = WeakKeyDictionary()
"""By model: its attention and modules when it was tried, and what `_branches_rightly` found."""


@torch.no_grad()
def _branches_rightly(model) -> bool:
    """Whether candidates behind a shared, padded prompt get the states that each has at the end of a text of its own."""
    config = model.config.get_text_config(decoder=True)
    ids = (torch.arange(18, device=model.device) % config.vocab_size).view(2, 9)
    prompt, candidates = ids[:, :3], ids[:, 3:]
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]], device=model.device)
    cache = RowCache(config, 2, 9, model.device)
    more = {cache_name(model): cache, "use_cache": True}
    with evaluating(model):
        try:
            model(input_ids=prompt, attention_mask=additive(cache.join(mask), model), position_ids=positions(mask), **more)
            seen, place = additive(cache.branches(6), model), cache.position.expand(2, 6)
            together = model(input_ids=candidates, attention_mask=seen, position_ids=place, **more)[0]
        except Exception:  # whatever another package's model stumbles over: it takes no such masks
            return False
        texts = [torch.cat([prompt[row, start:].repeat(6, 1), candidates[row, :, None]], 1) for row, start in ((0, 2), (1, 0))]
        alone = [model(input_ids=several)[0][:, -1] for several in texts]
    return alike(together, torch.stack(alone))


def additive(mask: Tensor, model: nn.Module) -> Tensor:
    """A bool mask [B, 1, Q, K] in the form that the model's attention takes (eager attention adds it to the scores)."""
    if model.config._attn_implementation != "eager":
        return mask
    dtype = next(model.parameters()).dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def positions(mask: Tensor) -> Tensor:
    """Of each token, int64 [B, T], where padding on the left, of position 0, does not count."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether states [..., D] are the same but for rounding. Values that are not numbers are ignored: decoders refuse them."""
    exact = one.dtype.itemsize >= 4 and torch.get_float32_matmul_precision() == "highest"
    one, other = (states.double().nan_to_num(0.0, 0.0, 0.0) for states in (one, other))
    return bool(((one - other).norm(dim=-1) <= (1e-3 if exact else 0.1) * other.norm(dim=-1)).all())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it the model is in eval mode; afterwards each module is in its old mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_layers(model) -> None:
    """Raises PyargsError for layers that no cache serves: a layer that is used twice but has one place in the cache, or one
    whose tokens see later tokens, which would change old states."""
    first: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(getattr(module, "layer_idx", None)) is not int:
            continue
        if first.setdefault(id(module), name) != name:
            raise PyargsError(
                f"{first[id(module)]} and {name} are one module, so both would write to layer {module.layer_idx} of the "
                "cache: give each place a copy (copy.deepcopy) with a layer_idx of its own"
            )
        if getattr(module, "is_causal", None) is False and "Cross" not in type(module).__name__:
            raise PyargsError(
                f"{name} sees later tokens (is_causal = False), so nothing can be decoded token by token: set is_causal = True"
            )


def can_share(model) -> bool:
    """Whether responses may share one prompt in a pass: `can_branch`, and no hook that would see them side by side."""
    return may_replace(model) and can_branch(model)


CACHE_NAMES = "cache", "past_key_values", "cache_params"
"""Names of a cache in `forward`: since transformers 5.24; before; of state-space models before."""


def cache_name(model) -> str:
    """The argument of the model's `forward` that is its cache. Raises PyargsError if there is none."""
    for name in CACHE_NAMES:
        if name in parameters(type(model)):
            return name
    raise PyargsError(
        f"{type(model).__name__}.forward takes no cache ({', '.join(CACHE_NAMES)}), so it cannot go on token by token: "
        f"give the model of transformers itself, without what wraps it"
    )


@once
def parameters(kind: type) -> frozenset[str]:
    """Names of the arguments of a model class's `forward`."""
    return frozenset(inspect.signature(kind.forward).parameters)
