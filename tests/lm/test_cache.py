"""What a model calls its cache."""

from __future__ import annotations

import pytest
from conftest import FULL_ATTENTION, tiny_lm

from pyargs.errors import PyargsError
from pyargs.lm.cache import cache_name, can_branch


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
