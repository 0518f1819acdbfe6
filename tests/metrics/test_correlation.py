"""Correlations are scipy's, intervals resample methods, and nothing undefined becomes a number."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from pyargs.errors import PyargsError
from pyargs.metrics.correlation import STATISTICS, correlate, correlate_methods, weighted

SCIPY = dict(zip(STATISTICS, (stats.kendalltau, stats.spearmanr, stats.pearsonr), strict=True))

NUMBERS = st.lists(st.tuples(st.integers(0, 8), st.integers(-4, 4)), min_size=3, max_size=20)


@settings(deadline=None)
@given(NUMBERS)
def test_correlations_are_scipys(points):
    x, y = zip(*points, strict=True)
    found = correlate(x, y)
    assert found["n"] == len(points)
    for name, function in SCIPY.items():
        if len(set(x)) == 1 or len(set(y)) == 1:
            assert found[name] is None
        else:
            assert found[name] == pytest.approx(function(x, y).statistic, abs=1e-9)


@settings(deadline=None)
@given(NUMBERS, st.integers(0, 100))
def test_weighted_points_are_repeated_points(points, seed):
    x, y = (np.array(side, dtype=float) for side in zip(*points, strict=True))
    weights = np.random.default_rng(seed).integers(0, 4, (5, len(points))).astype(float)
    assume(weights.any(1).all())
    found = weighted(x, y, weights)
    for n, row in enumerate(weights.astype(int)):
        again_x, again_y = np.repeat(x, row), np.repeat(y, row)
        for name, function in SCIPY.items():
            if np.ptp(again_x) == 0 or np.ptp(again_y) == 0:
                assert not np.isfinite(found[name][n])
            else:
                assert found[name][n] == pytest.approx(function(again_x, again_y).statistic, abs=1e-9)


def test_what_is_undefined_is_none_and_never_nan():
    for points in ({}, {"a": [(1, 2)]}, {"a": [(1, 2), (2, 3)]}, {"a": [(1, 2)] * 3, "b": [(1, 3)], "c": [(1, 5)]}):
        found = correlate_methods(points)
        json.dumps(found, allow_nan=False)
        assert all(found[kind][name]["value"] is None for kind in ("points", "means") for name in STATISTICS)
        assert found["points"]["n"] == sum(map(len, points.values())) and found["means"]["n"] == len(points)
    with pytest.raises(PyargsError, match="not a number"):
        correlate([1, 2, math.nan], [1, 2, 3])
    with pytest.raises(PyargsError, match="same length"):
        correlate([1, 2], [1, 2, 3])
    with pytest.raises(PyargsError, match="'b' has no point"):
        correlate_methods({"a": [(1, 2)], "b": []})


def test_intervals_resample_methods_and_not_points():
    """Ten copies of each method's point carry no more information than one; scipy's own bootstrap of points would shrink."""
    draw = np.random.default_rng(0)
    once = {name: [tuple(draw.normal(size=2))] for name in "abcdefgh"}
    tenfold = {name: points * 10 for name, points in once.items()}
    one, ten = (correlate_methods(points)["points"]["pearson"] for points in (once, tenfold))
    assert ten["value"] == pytest.approx(one["value"])
    assert (ten["low"], ten["high"]) == pytest.approx((one["low"], one["high"]), abs=1e-9)
    assert one["low"] < one["value"] < one["high"] and 0 <= one["undefined"] < 0.01


def test_two_methods_have_points_but_no_interval():
    found = correlate_methods({"a": [(1, 2), (2, 1)], "b": [(3, 5), (4, 4)]})
    assert found["points"]["kendall"]["value"] is not None and found["points"]["kendall"]["low"] is None
    assert found["means"]["kendall"]["value"] is None and found["means"]["n"] == 2


def test_correlations_are_seeded():
    points = {name: [(i, (i * 7) % 5), (i + 0.5, i)] for i, name in enumerate("abcdef")}
    assert correlate_methods(points) == correlate_methods(points)
    assert correlate_methods(points, seed=1)["points"]["kendall"]["low"] is not None
