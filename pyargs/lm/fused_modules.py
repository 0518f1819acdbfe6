"""Fewer kernels in a decoding step: a small model on a GPU spends its time launching them, even from a CUDA graph.

transformers writes a norm as eight operators, a rotary embedding as ten, and copies the keys for each group of query heads.
Here are the same formulas in one operator, in four, and without the copy. A model may mean something else by the same name, so
each of the three is used only if a short pass through the model gives the same states with it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pyargs.lm.rotary_table import tabulate
from pyargs.lm.structure import GROUPED


@contextmanager
def few_launches(*decoders: nn.Module, places: int = 0):
    """Within it passes of few tokens behind a long prefix, with a mask [B, 1, n, places], take fewer launches.

    decoders: models without output layer; places: of their caches, 0 where that is not known. What it yields, tensors, has to
    live as long as what was captured. By one thread at a time: modules of transformers are changed; what other threads
    compute meanwhile is right, too.
    """
    tables: list[Tensor] = []
    with ExitStack() as undo:
        for number, decoder in enumerate({id(one): one for one in decoders}.values()):
            expected = _probe(decoder)
            for change in (partial(_group_heads, number), _fuse_norms, _fuse_rotary, partial(tabulate, places, tables)):
                with ExitStack() as tried:
                    change(decoder, tried.callback)
                    if _same(decoder, expected):
                        undo.push(tried.pop_all())
        yield tables


def _probe(decoder: nn.Module) -> Tensor:
    """States of four tokens."""
    device = next(decoder.parameters()).device
    ids = torch.arange(4, device=device).unsqueeze(0) % decoder.get_input_embeddings().weight.shape[0]
    seen = torch.ones(1, 1, 4, 4, dtype=torch.bool, device=device).tril()
    if decoder.config._attn_implementation == "eager":
        seen = torch.zeros(seen.shape, dtype=decoder.dtype, device=device).masked_fill(~seen, torch.finfo(decoder.dtype).min)
    with torch.no_grad():
        return decoder(
            input_ids=ids, attention_mask=seen, position_ids=torch.arange(4, device=device).unsqueeze(0), use_cache=False
        ).last_hidden_state.float()


def _same(decoder: nn.Module, expected: Tensor) -> bool:
    try:
        difference = (_probe(decoder) - expected).norm() / expected.norm()
    except (RuntimeError, TypeError, ValueError, AttributeError):  # of other shapes, dtypes or arguments
        return False
    return difference.item() < 8 * torch.finfo(decoder.dtype).eps ** 0.75  # another formula is off by some tenths


def _group_heads(number: int, decoder: nn.Module, undo: Callable) -> None:
    """number: of the decoder; it keeps its name for good, under which another thread may have yet to look."""
    config = decoder.config.get_text_config(decoder=True)
    if config._attn_implementation == "sdpa":
        attention, name = _Grouped(), f"{GROUPED}_{number}"
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, sdpa_mask)  # for passes of other threads: without, no padding would be masked
        undo(attention.forget)
        undo(setattr, config, "_attn_implementation", "sdpa")
        config._attn_implementation = name


class _Grouped:
    """Attention in which query heads that share keys stand side by side as queries of one head: no key is copied for each.

    The mask is brought into that form, and from bool to what is added to the scores, once for all layers of a pass.
    """

    def __init__(self):
        self.last: tuple[Tensor | None, Tensor | None] = None, None

    def forget(self) -> None:
        self.last = None, None

    def __call__(self, module, query, key, value, attention_mask: Tensor | None, scaling: float | None = None, **more):
        if attention_mask is None or attention_mask.dtype != torch.bool:  # another thread's pass
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
        rows, heads, count, width = query.shape
        groups = heads // key.shape[1]
        seen, mask = self.last
        if seen is not attention_mask:
            shape = len(attention_mask), groups if count > 1 else 1, *attention_mask.shape[2:]
            mask = torch.full(shape, -torch.inf, dtype=query.dtype, device=query.device)
            mask = mask.masked_fill_(attention_mask, 0.0).flatten(1, 2).unsqueeze(1)
            self.last = attention_mask, mask
        out = F.scaled_dot_product_attention(
            query.reshape(rows, heads // groups, groups * count, width), key, value, attn_mask=mask, scale=scaling
        )
        return out.reshape(rows, heads, count, -1).transpose(1, 2).contiguous(), None


def _fuse_norms(decoder: nn.Module, undo: Callable) -> None:
    for norm in decoder.modules():
        epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        if type(norm).__name__.endswith("RMSNorm") and isinstance(epsilon, float) and "forward" not in vars(norm):
            norm.forward = partial(_rms_norm, norm, epsilon)
            undo(delattr, norm, "forward")


def _rms_norm(norm: nn.Module, epsilon: float, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, epsilon)


def _fuse_rotary(decoder: nn.Module, undo: Callable) -> None:
    source = sys.modules[type(decoder).__module__]
    if hasattr(source, "apply_rotary_pos_emb"):
        undo(setattr, source, "apply_rotary_pos_emb", source.apply_rotary_pos_emb)
        source.apply_rotary_pos_emb = _Rotary(source.apply_rotary_pos_emb)


class _Rotary:
    """apply_rotary_pos_emb for queries and keys at once. Half of the sine's signs are turned once for all layers of a pass.

    written: by transformers, for another model of the family, in which only a part of each head is turned.
    """

    def __init__(self, written: Callable):
        self.written = written
        self.last: tuple[Tensor | None, Tensor | None] = None, None

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if cos.shape[-1] != q.shape[-1]:
            return self.written(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        half = sin.shape[-1] // 2
        given, sine = self.last
        if given is not sin:
            turned = sin if hasattr(sin, "turned") else torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
            sine = turned.unsqueeze(unsqueeze_dim)
            self.last = sin, sine
        both = torch.cat([q, k], dim=1)
        turned = torch.addcmul(both * cos.unsqueeze(unsqueeze_dim), both.roll(half, -1), sine).to(q.dtype)
        return turned.split([q.shape[1], k.shape[1]], dim=1)
