"""Fewer kernels for a decoding step: of a small model on a GPU the time goes into launching them, even from a CUDA graph.

transformers writes a norm as eight operators, a rotary embedding as ten, and copies the keys for each group of query heads.
Here stand the same formulas in one, four, and without the copy. They differ from it by rounding, so each is first compared
with what it replaces, on random numbers, and left out where the model means something else by the name.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface


@contextmanager
def few_launches(*models: nn.Module):
    """Within it passes of few tokens behind a long prefix, with a mask [B, 1, n, places], take fewer launches."""
    with ExitStack() as undo:
        for model in models:
            config = model.config.get_text_config(decoder=True)
            if config._attn_implementation == "sdpa":
                AttentionInterface.register("pyargs_grouped", _Grouped())
                undo.callback(setattr, config, "_attn_implementation", "sdpa")
                config._attn_implementation = "pyargs_grouped"
            for norm in model.modules():
                if type(norm).__name__.endswith("RMSNorm") and "forward" not in vars(norm) and _is_rms_norm(norm):
                    norm.forward = partial(_rms_norm, norm)
                    undo.callback(delattr, norm, "forward")
            source = sys.modules[type(model).__module__]
            rotary = getattr(source, "apply_rotary_pos_emb", None)
            if rotary is not None and _is_rotary(rotary):
                undo.callback(setattr, source, "apply_rotary_pos_emb", rotary)
                source.apply_rotary_pos_emb = _Rotary()
        yield


class _Grouped:
    """Attention in which query heads that share keys stand side by side as queries of one head: no key is copied for each.

    The mask is brought into that form, and from bool to what is added to the scores, once for all layers of a pass.
    """

    def __init__(self):
        self.mask: tuple[Tensor, Tensor] | None = None

    def __call__(self, module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling=None, **_):
        rows, heads, count, width = query.shape
        groups = heads // key.shape[1]
        if self.mask is None or self.mask[0] is not attention_mask:
            added = torch.zeros(attention_mask.shape, dtype=query.dtype, device=query.device)
            added.masked_fill_(~attention_mask, -torch.inf)
            self.mask = attention_mask, added if count == 1 else added.repeat(1, 1, groups, 1)
        out = F.scaled_dot_product_attention(
            query.reshape(rows, heads // groups, groups * count, width), key, value, attn_mask=self.mask[1], scale=scaling
        )
        return out.reshape(rows, heads, count, -1).transpose(1, 2), None


def _rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, _epsilon(norm))


def _epsilon(norm: nn.Module) -> float | None:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _is_rms_norm(norm: nn.Module) -> bool:
    weight = getattr(norm, "weight", None)
    if weight is None or _epsilon(norm) is None:
        return False
    x = torch.randn(4, *weight.shape, device=weight.device, dtype=weight.dtype)
    return _alike(norm(x), _rms_norm(norm, x))


class _Rotary:
    """apply_rotary_pos_emb for queries and keys at once. Half of the sine's signs are turned once for all layers of a pass."""

    def __init__(self):
        self.sine: tuple[Tensor, Tensor] | None = None

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        half = sin.shape[-1] // 2
        if self.sine is None or self.sine[0] is not sin:
            self.sine = sin, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1).unsqueeze(unsqueeze_dim)
        both = torch.cat([q, k], dim=1)
        turned = torch.addcmul(both * cos.unsqueeze(unsqueeze_dim), both.roll(half, -1), self.sine[1])
        return turned.split([q.shape[1], k.shape[1]], dim=1)


def _is_rotary(rotary) -> bool:
    q, k, angle = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(2, 3, 8)
    try:
        theirs = rotary(q, k, angle.cos(), angle.sin())
    except (TypeError, RuntimeError):  # it takes other arguments
        return False
    return all(_alike(one, two) for one, two in zip(theirs, _Rotary()(q, k, angle.cos(), angle.sin()), strict=True))


def _alike(one: Tensor, other: Tensor) -> bool:
    tolerance = 4 * torch.finfo(one.dtype).eps
    return torch.allclose(one.float(), other.float(), atol=tolerance, rtol=tolerance)
