"""What a model calls its cache, whether candidates can branch from it, and what else is found out by trying."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import FULL_ATTENTION, tiny_lm
from families import CAPPED, FAMILIES, NO_BRANCHES, random_lm
from torch import nn

from pyargs.errors import PyargsError
from pyargs.lm.cache import RowCache, cache_name, can_branch
from pyargs.lm.forward import masks_every_step, plain_output_layer


class Summing(nn.Module):
    def forward(self, x):
        return x.cumsum(1)


def test_a_model_is_tried_again_when_a_module_was_replaced():
    policy = tiny_lm()
    assert can_branch(policy) and masks_every_step(policy)
    old, policy.model.layers[0].mlp = policy.model.layers[0].mlp, Summing()
    assert not can_branch(policy)
    with pytest.raises(PyargsError, match="does not leave padding out"):
        masks_every_step(policy)
    policy.model.layers[0].mlp = old
    assert can_branch(policy) and masks_every_step(policy)


def test_what_a_model_does_is_found_out():
    """Once for all families, without decoding anything."""
    for name in FAMILIES:
        lm = random_lm(name, 0)
        assert can_branch(lm) == can_branch(lm.get_decoder()) == (name not in NO_BRANCHES), name
        assert masks_every_step(lm) == (name not in ("mamba",)), name
        assert plain_output_layer(lm) == (name not in CAPPED), name


def test_trying_a_model_leaves_its_modes_as_they_were():
    lm = copy.deepcopy(random_lm("llama", 0)).train()
    lm.model.layers[0].eval()
    before = [module.training for module in lm.modules()]
    assert can_branch(lm) and masks_every_step(lm) and plain_output_layer(lm)
    assert [module.training for module in lm.modules()] == before


class Takes:
    """Models by what their `forward` calls a cache."""

    class Today:
        def forward(self, input_ids, cache=None, past_key_values=None): ...

    class Before:
        def forward(self, input_ids, past_key_values=None): ...

    class StateSpace:
        def forward(self, input_ids, cache_params=None): ...

    class Wrapped:
        def forward(self, *args, **kwargs): ...


def test_a_cache_goes_by_the_name_that_the_model_has_for_it():
    names = {Takes.Today: "cache", Takes.Before: "past_key_values", Takes.StateSpace: "cache_params"}
    assert {kind: cache_name(kind()) for kind in names} == names
    with pytest.raises(PyargsError, match=r"Wrapped.forward takes no cache"):
        cache_name(Takes.Wrapped())
    # What transformers has today: without its name the cache would be left out, and every token would be read alone.
    assert all(can_branch(tiny_lm(family)) for family in FULL_ATTENTION)


@torch.no_grad()
def test_a_cache_that_found_no_memory_midway_grows_later(monkeypatch):
    lm = tiny_lm()
    config = lm.config.get_text_config(decoder=True)
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    caches = [RowCache(config, 2, 8, lm.device) for _ in range(2)]
    for cache in caches:
        cache.join(torch.ones_like(ids))
        lm(input_ids=ids, use_cache=True, **{cache_name(lm): cache})
        cache.commit(torch.zeros(2, dtype=torch.long))  # notes where keys and values lie
    whole, broken = caches
    pad, calls = nn.functional.pad, []

    def full(*args):
        calls.append(args)
        if len(calls) == 3:
            raise torch.cuda.OutOfMemoryError
        return pad(*args)

    with pytest.raises(torch.cuda.OutOfMemoryError), monkeypatch.context() as patch:
        patch.setattr(nn.functional, "pad", full)
        broken.reserve(40)
    for capacity in (8, 12, 48):  # as long as it was; shorter and longer than the layers that have grown
        for cache in caches:
            cache.reserve(capacity)
            cache.branches(2)
            lm(input_ids=ids[:, :2], use_cache=True, **{cache_name(lm): cache})
            cache.commit(torch.tensor([1, 0]))
        for one, other in zip(whole.layers, broken.layers, strict=True):
            assert one.keys.shape[2] == capacity <= other.keys.shape[2] <= 48
            for states, others in ((one.keys, other.keys), (one.values, other.values)):
                assert torch.equal(states, others[:, :, :capacity])
