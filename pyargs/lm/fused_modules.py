"""Fewer kernels in a decoding step: a small model on a GPU spends its time launching them, even from a CUDA graph.

transformers writes a norm as eight operators, a rotary embedding as ten, copies the keys for each group of query heads, and
wants a mask over all places of the cache. Here are the same formulas in one operator, in four, without the copy, and without
the mask. A model may mean something else by the same name, so each is used only if a short pass through the model gives the
same states with it.
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

from pyargs.lm.cache import RowCache, additive, cache_name, positions
from pyargs.lm.exact import HALVES, InFloat32
from pyargs.lm.rotary_table import tabulate
from pyargs.lm.structure import GROUPED
from pyargs.ops import branch_attention

WRONG = RuntimeError, TypeError, ValueError, AttributeError
"""What a pass raises if shapes, dtypes or arguments are not as a change expects them."""
BY_LENGTH = f"{GROUPED}_by_length"
OTHERWISE = "dropout", "position_bias", "softcap", "s_aux", "sliding_window", "output_attentions"
"""Arguments of an attention by which it is not the one that `branch_attention` computes."""


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
            expected = _passes(_probe, decoder)
            _try(decoder, undo, _attend_by_length, _probe_branches)
            for change in (partial(_group_heads, number), _fuse_norms, _fuse_rotary, partial(tabulate, places, tables)):
                _try(decoder, undo, change, _probe, expected)
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


def _probe_branches(decoder: nn.Module) -> Tensor:
    """States of three branches of two rows, behind one token and behind three."""
    device = next(decoder.parameters()).device
    config = decoder.config.get_text_config(decoder=True)
    cache = RowCache(config, 2, 6, device)
    more = {cache_name(decoder): cache, "use_cache": True}
    ids = (torch.arange(6, device=device) % decoder.get_input_embeddings().weight.shape[0]).view(2, 3)
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]], device=device)
    with torch.no_grad():
        seen = additive(cache.join(mask), decoder)
        decoder(input_ids=ids, attention_mask=seen, position_ids=positions(mask), **more)
        cache.captured = 2
        seen = additive(cache.branches(3, takes_lengths(decoder)), decoder)
        place = cache.position.expand(2, 3)
        return decoder(input_ids=ids.flip(1), attention_mask=seen, position_ids=place, **more).last_hidden_state.float()


def _passes(probe: Callable, decoder: nn.Module) -> list[Tensor]:
    """The states of a pass as it is, and one in float32 where the decoder's dtype is so coarse that it hides a formula."""
    found = [probe(decoder)]
    if decoder.dtype in HALVES:
        with InFloat32():
            found.append(probe(decoder))
    return found


def _try(decoder: nn.Module, undo: ExitStack, change: Callable, probe: Callable, expected: list | None = None) -> None:
    """Makes a change that stays until the end of `undo` if the probe gives the same with it."""
    with ExitStack() as tried:
        try:
            expected = _passes(probe, decoder) if expected is None else expected
            change(decoder, tried.callback)
            found = _passes(probe, decoder)
        except torch.OutOfMemoryError:
            raise
        except WRONG:
            return
        dtypes = decoder.dtype, torch.float32
        if all(_alike(*both) for both in zip(found, expected, dtypes, strict=False)):
            undo.push(tried.pop_all())


def _alike(states: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether they differ by rounding in this dtype alone."""
    return ((states - expected).norm() / expected.norm()).item() < 8 * torch.finfo(dtype).eps ** 0.75


def _attend_by_length(decoder: nn.Module, undo: Callable) -> None:
    config = decoder.config.get_text_config(decoder=True)
    if config._attn_implementation == "sdpa":
        AttentionInterface.register(BY_LENGTH, _by_length)  # for good: another thread may have yet to look
        AttentionMaskInterface.register(BY_LENGTH, sdpa_mask)  # for passes of other threads, as below
        undo(setattr, config, "_attn_implementation", "sdpa")
        config._attn_implementation = BY_LENGTH


def takes_lengths(model: nn.Module) -> bool:
    """Whether the model's attention now takes the lengths int64 [n, 1, 1, 1] of prefixes in the place of a mask."""
    return model.config.get_text_config(decoder=True)._attn_implementation == BY_LENGTH


def _by_length(module, query, key, value, attention_mask: Tensor | None, scaling: float | None = None, **more):
    """Attention of branches, which see their prefix and themselves, without a mask."""
    if attention_mask is None or attention_mask.dtype != torch.int64:  # another thread's pass, or prompts
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
    for name in OTHERWISE:
        if (given := more.get(name)) is not None and (isinstance(given, Tensor) or given):
            raise ValueError(f"attention with {name} needs a mask")
    return branch_attention(query, key, value, attention_mask.flatten(), scaling), None


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
    weight = norm.weight.to(torch.promote_types(norm.weight.dtype, x.dtype))  # mostly as it is
    return F.rms_norm(x, weight.shape, weight, epsilon)


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
            turned = getattr(sin, "turned", None)
            turned = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1) if turned is None else turned
            sine = turned.unsqueeze(unsqueeze_dim)
            self.last = sin, sine
        both = torch.cat([q, k], dim=1)
        turned = torch.addcmul(both * cos.unsqueeze(unsqueeze_dim), both.roll(half, -1), sine).to(q.dtype)
        return turned.split([q.shape[1], k.shape[1]], dim=1)
