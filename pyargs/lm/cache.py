"""The key-value cache of the decoders: one prefix per row that several next tokens can branch from."""

from __future__ import annotations

import inspect
from functools import cache as once

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from pyargs.ops.commit import MOST, commit


class PrefixLayer(CacheLayerMixin):
    """Keys and values [B, heads, capacity, head_dim] of one layer, of which the first `length` places are the prefix.

    `update` writes behind the prefix without making it longer; `advance` or `commit` then say what stays. The length is a
    host integer that the decoder knows anyway, so nothing waits for the device.
    """

    is_sliding = False

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.length = capacity, 0

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
        return self.length

    def get_max_length(self) -> int:
        return self.capacity


class PrefixCache(Cache):
    """A PrefixLayer for each layer of a full-attention model, with room for `capacity` tokens per row."""

    def __init__(self, config, capacity: int):
        super().__init__(layers=[PrefixLayer(capacity) for _ in range(config.num_hidden_layers)])
        self._lists: list[list[Tensor]] | None = None

    def advance(self, tokens: int) -> None:
        """The last `tokens` places written become part of the prefix."""
        for layer in self.layers:
            layer.length += tokens

    def commit(self, slot: Tensor) -> None:
        """Of the branches written behind the prefix, the one at slot [B] becomes its next token; the others are dropped."""
        for several in self._alike():
            length = torch.full((), self.layers[0].length, device=several[0].device)
            commit(several, slot.to(length.device), length)
        self.advance(1)

    def _alike(self) -> list[list[Tensor]]:
        """The keys and values of all layers, by device, shape and dtype; mostly one list. They stay where they are."""
        if self._lists is None:
            alike: dict[tuple, list[Tensor]] = {}
            for layer in self.layers:
                for states in (layer.keys, layer.values):
                    alike.setdefault((states.device, states.shape, states.stride(), states.dtype), []).append(states)
            self._lists = [several[i : i + MOST] for several in alike.values() for i in range(0, len(several), MOST)]
        return self._lists


def can_branch(model) -> bool:
    """Whether candidates may stand beside each other behind one prefix: full attention in all layers, by mask and position.

    Not so for sliding-window and linear-attention layers, state-space models, ALiBi, and attention kernels that take no mask.
    """
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return False
    if config._attn_implementation not in ("sdpa", "eager") or not {
        "position_ids", "past_key_values",
    } <= parameters(type(model)):  # fmt: skip
        return False
    layers = DynamicCache(config=config).layers
    return len(layers) > 0 and all(type(layer) is DynamicLayer for layer in layers)


@once
def parameters(kind: type) -> frozenset[str]:
    """Names that the `forward` of a model class takes."""
    return frozenset(inspect.signature(kind.forward).parameters)
