"""Cosines and sines of all positions: a captured pass looks those of its tokens up, in one operator in place of eleven."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

STEADY = "default", "linear", "llama3", "yarn"
"""Kinds of rotary embeddings whose frequencies are the same for texts of any length."""


def tabulate(places: int, tables: list[Tensor], decoder: nn.Module, undo: Callable) -> None:
    """In this thread the decoder's `rotary_emb` looks positions below `places` up, if its frequencies are steady. What it
    gives is what it computes otherwise. The sine's attribute `turned` is the same with the sign of the first half turned, as
    the rotation of halves takes it: who does not know it, or gets a copy of the sine without it, is right too. A table
    [places, 3 width] is added to `tables`, and has to live as long as what was captured."""
    rotary = getattr(decoder, "rotary_emb", None)
    if not places or rotary is None or "forward" in vars(rotary) or getattr(rotary, "rope_type", None) not in STEADY:
        return
    like = torch.empty(1, 1, dtype=decoder.dtype, device=next(decoder.parameters()).device)
    with torch.no_grad():
        cos, sin = rotary(like, torch.arange(places, device=like.device).unsqueeze(0))
    half = sin.shape[-1] // 2
    table = torch.cat([cos, sin, -sin[..., :half], sin[..., half:]], -1).squeeze(0)
    rotary.forward = partial(_look_up, rotary.forward, threading.get_ident(), table)
    undo(delattr, rotary, "forward")
    tables.append(table)


def _look_up(written: Callable, thread: int, table: Tensor, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """In this thread from the table, elsewhere as it is written."""
    if threading.get_ident() != thread or x.dtype != table.dtype or x.device != table.device:
        return written(x, position_ids)
    cosine, sine, sine.turned = table[position_ids].chunk(3, -1)
    return cosine, sine
