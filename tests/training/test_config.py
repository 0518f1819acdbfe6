"""Settings out of range raise where they are written."""

from __future__ import annotations

import planted
import pytest
from formulas import USERS

from pyargs.errors import PyargsError
from pyargs.methods import genarm, icl, lore, mpu, pal, pref, vpl


def test_settings_out_of_range_raise():
    for make in (
        lambda: mpu.Config(hidden=0),
        lambda: vpl.Config(max_context=0),
        lambda: lore.Config(rank=0),
        lambda: icl.Config(show="both"),
        lambda: pref.Config(adapt_steps=-3),
        lambda: pal.Config(variant="C"),
        lambda: genarm.Config(batch_size=0),
    ):
        with pytest.raises(PyargsError, match="must be at least|is one of"):
            make()
    with pytest.raises(PyargsError, match="above max_context"):
        vpl.build(planted.Backbone(), None, USERS, vpl.Config(min_context=9))
