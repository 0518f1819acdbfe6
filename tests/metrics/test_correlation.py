"""Correlations are scipy's, intervals resample what is independent, and nothing undefined becomes a number."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from pyargs.errors import PyargsError
from pyargs.metrics.bootstrap import resamples, small_sample, user_difference, user_interval
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


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.sampled_from([0.0, 100.0]), min_size=1, max_size=6), min_size=2, max_size=8))
def test_the_interval_holds_the_mean(users):
    values = {str(n): each for n, each in enumerate(users)}
    found = user_interval(values, draws=2000)
    every = [value for each in users for value in each]
    assert found["mean"] == pytest.approx(sum(every) / len(every)) and found["n"] == len(every)
    wider = small_sample(len(users))
    assert found["mean"] * (1 - wider) - 1e-6 <= found["low"] <= found["mean"] + 1e-6
    assert found["mean"] - 1e-6 <= found["high"] <= found["mean"] + wider * (100 - found["mean"]) + 1e-6


def test_the_interval_shrinks_with_users_and_not_with_copies_of_pairs():
    draw = np.random.default_rng(0)
    users = {str(n): list(100.0 * (draw.random(10) < draw.random())) for n in range(400)}
    few = {user: users[user] for user in list(users)[:25]}
    width = lambda found: found["high"] - found["low"]  # noqa: E731
    assert width(user_interval(users)) < 0.4 * width(user_interval(few)), "widened for 25 users by a tenth"
    copied = {user: values * 5 for user, values in few.items()}
    assert width(user_interval(copied)) == pytest.approx(width(user_interval(few)))


def test_the_interval_is_that_of_a_plain_bootstrap_widened_for_few_users():
    users = {"a": [100], "b": [0] * 12, "c": [100, 0], "d": [100], "e": [0] * 8 + [100]}  # pairs count, not users
    draw, means = np.random.default_rng(1), []
    for _ in range(4000):
        taken = [value for name in draw.choice(list(users), len(users)) for value in users[name]]
        means.append(np.mean(taken))
    found = user_interval(users)
    factor = stats.t.ppf(0.975, 4) / stats.norm.ppf(0.975) * (5 / 4) ** 0.5
    right = [found["mean"] + factor * (end - found["mean"]) for end in np.quantile(means, (0.025, 0.975))]
    assert (found["low"], found["high"]) == pytest.approx(tuple(right), abs=3)


def test_a_difference_is_paired():
    """Users differ a lot and the methods by five points: only the paired interval sees it."""
    draw = np.random.default_rng(0)
    other = {str(n): [level] for n, level in enumerate(draw.uniform(0, 90, 30))}
    own = {user: [level + 5] for user, (level,) in other.items()}
    found = user_difference(own, other)
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((5, 5, 5))
    with pytest.raises(PyargsError, match="same users"):
        user_difference(own, {"0": [1]})


def test_rows_that_are_the_same_differ_by_nothing():
    """Whatever the order in which their values are added up, and however many seeds they have."""
    draw = np.random.default_rng(0)
    own = {str(n): list(draw.uniform(0, 90, 17)) for n in range(10)}
    found = user_difference({user: values * 3 for user, values in own.items()}, own)
    assert (found["mean"], found["low"], found["high"]) == (0, 0, 0) and str(found["low"]) == "0.0"


@pytest.mark.parametrize("outcomes", ["normal", "right or wrong"])
def test_an_interval_over_ten_users_covers_what_it_should(outcomes):
    """Of 1,000 made-up sets of ten users: an interval of 95% misses the truth in about 50, a percentile one in over 80."""
    draw, missed, plain = np.random.default_rng(0), 0, 0
    for _ in range(1000):
        drawn = draw.normal(size=(10, 1)) if outcomes == "normal" else draw.random((10, 17)) < draw.beta(6, 3, size=(10, 1))
        truth = 0.0 if outcomes == "normal" else 6 / 9
        found = user_interval({str(n): each.tolist() for n, each in enumerate(drawn)}, draws=1000)
        missed += not found["low"] <= truth <= found["high"]
        ends = [found["mean"] + (found[end] - found["mean"]) / small_sample(10) for end in ("low", "high")]
        plain += not ends[0] <= truth <= ends[1]
    assert plain > 80 and 30 < missed < 75
    assert small_sample(10) == pytest.approx(1.2166, abs=1e-3) and small_sample(1000) == pytest.approx(1, abs=0.01)
    users = {str(n): each.tolist() for n, each in enumerate(drawn)}
    assert user_interval(users, level=0.99)["low"] < user_interval(users)["low"]


def test_intervals_of_nothing():
    with pytest.raises(PyargsError, match="at least one"):
        user_interval({})
    with pytest.raises(PyargsError, match="at least one"):
        user_interval({"a": []})
    with pytest.raises(PyargsError, match="user b"):
        user_interval({"a": [1.0], "b": [math.nan]})
    alone = user_interval({"a": [0.0, 100.0]})
    assert alone["mean"] == 50 and alone["low"] is None
    taken = resamples(7, 100)
    assert (taken.sum(1) == 7).all() and taken.shape == (100, 7)
